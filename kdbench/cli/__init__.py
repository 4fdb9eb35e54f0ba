"""The commands of kdbench: argument parsing, and the text that each command prints.

Commands call the packages `config`, `experiment` and `report`. They compute no tensor themselves.
"""
