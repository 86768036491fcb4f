"""The PostgreSQL that starts by itself where no database is named."""
