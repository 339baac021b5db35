"""SAEs for SAEBench: a folder with its own recipe, and which of our numbers have SAEBench's names."""
