"""Check and measure the kernels on a GPU: `python -m bench gpu`.

Each stage runs in a process of its own with its own time limit. All files go to one folder, and a
row is in its file as soon as it is known, so a stop loses nothing. Nothing needs a network.
`--dry-run` runs every stage on tiny sizes on the CPU, in Triton's interpreter.
"""
