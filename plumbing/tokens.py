"""What tokens are: the pixels that one covers, the ids beside the V codes, who made them."""
import hashlib

PATCH = 8  # a token covers PATCH x PATCH pixels
PAD, MASK = 1, 4  # counted from V, as in the released code: PAD is V + 1, MASK is V + 4
SPECIAL = 5  # rows of the embedding after the codes; the others are unused


def fingerprint(weights, arithmetic=""):
    """Twelve hexadecimal digits -> str. They change with any weight and with the arithmetic.

    weights: {name: tensor}.
    """
    digest = hashlib.sha256(arithmetic.encode())
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
