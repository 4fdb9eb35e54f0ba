"""The commands: argument parsing, and the text that commands print.

Commands call `config`, `experiment` and `report`. Nothing here computes a tensor."""
