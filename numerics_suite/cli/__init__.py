"""The command line: one file per command, thin over the stages; nothing heavy is imported before a command runs."""
