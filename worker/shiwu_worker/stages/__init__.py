"""The seven stages, in order: claim, fetch, decode, batch, encode, score, commit. None imports another."""
