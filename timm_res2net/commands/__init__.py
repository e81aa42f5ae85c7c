"""The commands of the command line, a file each: its arguments, its work."""
