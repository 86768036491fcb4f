"""What a role does on a message: one file a message, each naming the two or three things that it uses."""
