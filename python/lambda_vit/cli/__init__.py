"""The command line, a file per group of commands. It parses options, calls and prints; it computes nothing."""
