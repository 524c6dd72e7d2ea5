"""What a command needs of the machine and of its user: arguments, files, memory. Nothing here decides a bit."""
