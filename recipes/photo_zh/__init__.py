"""The embedded model photo-zh: EfficientNet-lite0's ImageNet weights and a small text tower that knows Chinese words.

    python -m recipes.photo_zh build       make the checkpoint and compare it with the shipped one
    python -m recipes.photo_zh evaluate    measure a checkpoint on photographs that other packages ship
    python -m recipes.photo_zh compare     compare a checkpoint with the shipped one

`make model` runs them in an environment of their own, with the versions of constraints.txt.
"""
