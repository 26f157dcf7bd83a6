"""The ids beside the V codes, counted from V as the released code numbers them: PAD is V + 1, MASK is V + 4."""
PAD, MASK = 1, 4
SPECIAL = 5  # rows of the embedding after the codes; the others are unused
