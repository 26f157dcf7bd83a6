"""The DALL-E tokenizer: files of its format, written here; and the PyPI package DALL-E where it is installed."""
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

import vqvae
from dalle import DalleVAE


@pytest.fixture(params=["old", "zip"])
def released(request, tmp_path):
    """encoder.pkl and decoder.pkl written by the real package, small, in torch.save's two formats."""
    encoder_module = pytest.importorskip("dall_e.encoder", reason="pip install --no-deps DALL-E attrs")
    decoder_module = pytest.importorskip("dall_e.decoder")
    torch.manual_seed(0)
    encoder = encoder_module.Encoder(n_hid=16, vocab_size=64)
    decoder = decoder_module.Decoder(n_init=8, n_hid=16, vocab_size=64)
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        with torch.no_grad():  # the package starts biases at 0 and weights small: give every tensor weight
            for p in module.parameters():
                p.add_(0.05 * torch.randn_like(p))
        torch.save(module, tmp_path / f"{name}.pkl", _use_new_zipfile_serialization=request.param == "zip")
    return tmp_path, encoder, decoder


def test_tokens_and_pictures_equal_the_package_s(released):
    folder, encoder, decoder = released
    vae = DalleVAE.from_pickles(folder / "encoder.pkl", folder / "decoder.pkl")
    frames = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    theirs = encoder(0.8 * frames.permute(0, 3, 1, 2).float() / 255 + 0.1)
    ours = vae.logits(frames)
    assert (ours - theirs).abs().max() < 1e-4
    best = theirs.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-4  # away from ties
    tokens = vae.encode(frames)
    assert clear.float().mean() > 0.95 and torch.equal(tokens[clear], theirs.argmax(dim=1)[clear])
    assert tokens.shape == (4, 4, 4) and tokens.dtype == torch.int64 and vae.vocab_size == 64
    one_hot = torch.nn.functional.one_hot(tokens, 64).permute(0, 3, 1, 2).float()
    upsample = [m for m in decoder.modules() if isinstance(m, torch.nn.Upsample)]
    assert len(upsample) == 3
    theirs = decoder(one_hot)
    assert (vae.statistics(tokens) - theirs).abs().max() < 1e-4
    picture = ((torch.sigmoid(theirs[:, :3]) - 0.1) / 0.8).clamp(0, 1).permute(0, 2, 3, 1)
    assert (vae.decode(tokens).float() / 255 - picture).abs().max() < 0.51 / 255 + 1e-4


def test_load_tokenizer_takes_the_released_file(released):
    folder, _, _ = released
    tokenizer = vqvae.load_tokenizer(folder / "encoder.pkl")  # decoder.pkl lies beside it
    frames = torch.randint(256, (1, 16, 16, 3), dtype=torch.uint8)
    assert tokenizer.decode(tokenizer.encode(frames)).shape == (1, 16, 16, 3)
    (folder / "decoder.pkl").unlink()
    with pytest.raises(ValueError, match="decoder.pkl"):
        vqvae.load_tokenizer(folder / "encoder.pkl").decode(torch.zeros(1, 2, 2, dtype=torch.long))


def test_a_file_that_names_another_function_is_refused_and_runs_nothing(released, tmp_path):
    folder, _, _ = released
    content = (folder / "encoder.pkl").read_bytes()
    names = b"cdall_e.utils\nConv2d\n"
    if content[:2] == b"PK":
        changed = io.BytesIO()
        with zipfile.ZipFile(folder / "encoder.pkl") as old, zipfile.ZipFile(changed, "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name).replace(names, b"cos\nsystem\n"))
        changed = changed.getvalue()
    else:
        changed = content.replace(names, b"cos\nsystem\n")
    assert changed != content
    (tmp_path / "bad.pkl").write_bytes(changed)
    with pytest.raises(ValueError, match="os.system"):
        DalleVAE.from_pickles(tmp_path / "bad.pkl")


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_nothing_that_a_file_says_is_run(tmp_path):
    mark = tmp_path / "ran"
    for content in (pickle.dumps(Call(exec, f"open({str(mark)!r}, 'w')")), b"", b"not a pickle", b"PK\3\4broken"):
        (tmp_path / "bad.pkl").write_bytes(content)
        with pytest.raises(ValueError, match="bad.pkl"):
            DalleVAE.from_pickles(tmp_path / "bad.pkl")
    torch.save({"call": Call(exec, f"open({str(mark)!r}, 'w')")}, tmp_path / "bad.pkl")
    with pytest.raises(ValueError, match="exec"):
        DalleVAE.from_pickles(tmp_path / "bad.pkl")
    torch.save(torch.zeros(3), tmp_path / "bad.pkl")
    with pytest.raises(ValueError, match="bad.pkl"):
        DalleVAE.from_pickles(tmp_path / "bad.pkl")
    assert not mark.exists()


def test_a_decoder_in_the_encoder_s_place_is_refused(released):
    folder, _, _ = released
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="decoder.pkl is not a DALL-E encoder"):
        DalleVAE.from_pickles(folder / "decoder.pkl").encode(frames)
