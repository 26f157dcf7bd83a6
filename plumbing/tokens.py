"""What tokens are: the pixels that one covers, the ids beside the V codes, who made them."""
import hashlib

PATCH = 8  # a token covers PATCH x PATCH pixels
PAD, MASK = 1, 4  # counted from V, as in the released code: PAD is V + 1, MASK is V + 4
SPECIAL = 5  # rows of the embedding after the codes; the others are unused


def fingerprint(weights):
    """{name: tensor} -> str of twelve hexadecimal digits, which change with any weight."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
