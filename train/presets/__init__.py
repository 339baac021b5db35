"""Published set-ups: the file name is the name, used as --preset <name>."""
