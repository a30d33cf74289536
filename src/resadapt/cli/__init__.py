"""The command line: a subcommand a file, which prints and returns an exit status."""
