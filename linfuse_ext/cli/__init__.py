"""The command line: `linfuse`, or `python -m linfuse_ext`.

main.py         the parser, and what a failure looks like
info.py         what is installed
collapse.py     a torch.export archive in, a smaller one out
matrix.py       the matrix of one layer of an archive, to a file
layers.py       the convolutions and Linears of an exported program
archives.py     reading and writing archives
archive_text.py what may stand in an archive, as torch runs parts of it
files.py        names of files to write
tables.py       tables on a terminal and elsewhere
"""
