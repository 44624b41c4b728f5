"""What a command shows: people on the console, programs in JSON."""
