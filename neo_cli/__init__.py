"""The `neo` command-line toolkit: argument parsing and terminal output over `engine`."""
