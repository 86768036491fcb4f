"""What runs in a transaction: command handlers, jobs, orders, and how plug-ins are found."""
