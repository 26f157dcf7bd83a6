"""The DALL-E tokenizer, on files that the PyPI package DALL-E writes, where it is installed."""
import pickle

import numpy as np
import pytest
import torch
from conftest import TINY, call, flags

import pretrain
import vqvae
from dalle import DalleVAE
from plumbing.cli import UserError


def build():
    """A small encoder and decoder of the real package."""
    encoders = pytest.importorskip("dall_e.encoder", reason="pip install --no-deps DALL-E attrs")
    decoders = pytest.importorskip("dall_e.decoder")
    torch.manual_seed(0)
    encoder = encoders.Encoder(n_hid=16, vocab_size=64)
    decoder = decoders.Decoder(n_init=8, n_hid=16, vocab_size=64)
    for module in (encoder, decoder):
        with torch.no_grad():  # biases start at 0 and weights are small: make every tensor count
            for p in module.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return encoder, decoder


@pytest.fixture
def released(tmp_path):
    """encoder.pkl and decoder.pkl in torch.save's old format, as released -> folder, modules."""
    encoder, decoder = build()
    torch.save(encoder, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=False)
    torch.save(decoder, tmp_path / "decoder.pkl", _use_new_zipfile_serialization=False)
    return tmp_path, encoder, decoder


def test_tokens_and_pictures_equal_those_of_the_package(released):
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
    with pytest.raises(UserError, match="decoder.pkl"):
        vqvae.load_tokenizer(folder / "encoder.pkl").decode(torch.zeros(1, 2, 2, dtype=torch.long))


def test_a_model_that_was_trained_on_a_gpu_reads_videos_on_a_cpu(released, monkeypatch):
    """Its tokenizer has the same fingerprint on both."""
    vae = DalleVAE.from_pickles(released[0] / "encoder.pkl")
    before = vae.fingerprint
    monkeypatch.setattr(DalleVAE, "device", property(lambda self: torch.device("cuda")))
    assert vae.fingerprint == before


def test_a_store_can_be_continued_without_the_decoder(released, write_video):
    """Without the decoder there are no pictures, and a line says so."""
    folder, _, _ = released
    write_video(folder / "videos/v.mp4", range(0, 240, 8))
    argv = ["tokenize", "--videos", "videos", "--tokenizer", "encoder.pkl", "--frame-size", 32,
            "--fps", 8, "--out", "s"]
    assert call(vqvae, *argv, place=folder).returncode == 0
    (folder / "decoder.pkl").unlink()
    assert "nothing is left to do" in call(vqvae, *argv, place=folder).stdout
    done = call(pretrain, "--data", "s", "--tokenizer", "encoder.pkl", "--frame-size", 32,
                "--steps", 2, "--out", "run", *flags(TINY), "--batch", 1, "--alpha", 0,
                place=folder)
    assert done.returncode == 0
    assert "no pictures of what the model fills in: there is no decoder.pkl" in done.stdout


def test_a_file_that_names_another_function_is_refused_and_runs_nothing(released, tmp_path):
    folder, _, _ = released
    content = (folder / "encoder.pkl").read_bytes()
    changed = content.replace(b"cdall_e.utils\nConv2d\n", b"cos\nsystem\n")
    assert changed != content
    (tmp_path / "bad.pkl").write_bytes(changed)
    with pytest.raises(UserError, match="os.system"):
        DalleVAE.from_pickles(tmp_path / "bad.pkl")


def test_files_of_today_s_torch_save_load_as_well(released, tmp_path):
    """torch.save has written zip files since version 1.6."""
    folder, encoder, decoder = released
    old = vqvae.load_tokenizer(folder / "encoder.pkl")
    (tmp_path / "new").mkdir()
    torch.save(encoder, tmp_path / "new/encoder.pkl")
    torch.save(decoder, tmp_path / "new/decoder.pkl")
    new = vqvae.load_tokenizer(tmp_path / "new/encoder.pkl")
    assert new.fingerprint == old.fingerprint and new.vocab_size == 64
    frames = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    tokens = old.encode(frames)
    assert torch.equal(new.encode(frames), tokens)
    assert torch.equal(new.decode(tokens), old.decode(tokens))


def test_a_zip_file_that_is_damaged_or_holds_another_module_is_refused(tmp_path):
    path = tmp_path / "encoder.pkl"
    for module, reason in ((torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
                           (torch.zeros(3), "the file holds no module")):
        torch.save(module, path)
        with pytest.raises(UserError, match=f"^{path}: .*{reason}"):
            vqvae.load_tokenizer(path)
    torch.save(build()[0], path)
    content = path.read_bytes()
    for length in (1000, len(content) // 2, len(content) - 4):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="encoder.pkl: no module") as error:
            vqvae.load_tokenizer(path)
        assert len(str(error.value).splitlines()) == 1


def test_a_download_cut_short_is_refused(released):
    folder, _, _ = released
    content = (folder / "encoder.pkl").read_bytes()
    for length in (0, 1000, len(content) // 2, len(content) - 4, len(content) - 1):
        (folder / "encoder.pkl").write_bytes(content[:length])
        with pytest.raises(UserError, match="encoder.pkl: no module"):
            vqvae.load_tokenizer(folder / "encoder.pkl")


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_no_code_of_a_file_is_run(tmp_path):
    mark = tmp_path / "ran"
    code = pickle.dumps(Call(exec, f"open({str(mark)!r}, 'w')"))
    for content in (code, b"", b"not a pickle", b"PK\3\4broken"):
        (tmp_path / "bad.pkl").write_bytes(content)
        with pytest.raises(UserError, match="bad.pkl"):
            DalleVAE.from_pickles(tmp_path / "bad.pkl")
    for zipped in (False, True):
        torch.save({"call": Call(exec, f"open({str(mark)!r}, 'w')")}, tmp_path / "bad.pkl",
                   _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="bad.pkl: the file names .*exec") as error:
            DalleVAE.from_pickles(tmp_path / "bad.pkl")
        assert len(str(error.value).splitlines()) == 1
    torch.save(torch.zeros(3), tmp_path / "bad.pkl", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="bad.pkl: the file holds no module"):
        DalleVAE.from_pickles(tmp_path / "bad.pkl")
    assert not mark.exists()


def test_a_decoder_instead_of_the_encoder_is_refused(released):
    folder, _, _ = released
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(UserError, match="decoder.pkl is not a DALL-E encoder"):
        DalleVAE.from_pickles(folder / "decoder.pkl").encode(frames)
