"""What is measured and tried in the first half hour on a GPU, in stages of one command each.

`python -m bench.card STAGE` runs a stage: floors, faults, tuning, probes, in this order. Each of its steps is a process
with a time limit of its own, so a step that fails or hangs does not end the stage. `--tiny` rehearses all steps with
small models and counts, on a CPU too, where a step that needs CUDA is skipped and reported.
`python -m bench.card.summary FOLDER` compares the results with the floors.

A machine without a network takes wheels: `python -m bench.card.pack` packs them, and `--wheels FOLDER` installs them.
"""
