"""The PostgreSQL that starts by itself if no database is named."""
