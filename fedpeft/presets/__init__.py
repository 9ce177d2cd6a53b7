"""One file per preset; a paper by its name, as plan lines with the paper's defaults."""
