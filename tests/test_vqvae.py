"""The VQ-VAE: its codebook, its training, and the files of `vqvae.py train` and `tokenize`."""
import numpy as np
import pytest
import torch
from conftest import call, run

import data
import vqvae
from plumbing import decoding
from plumbing.decoding import read_views
from plumbing.store import TokenStore
from vqvae import VQVAE, Codebook


def clusters(n=600, seed=0):
    """Points close to eight corners of a cube."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    index = torch.randint(8, (n,), generator=generator)
    return corners[index] + 0.05 * torch.randn(n, 3, generator=generator)


def test_codes_start_spread_and_move_to_the_means():
    torch.manual_seed(0)
    codebook = Codebook(8, 3, decay=0.9).train()
    for seed in range(60):
        codebook(clusters(seed=seed))
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    assert torch.cdist(corners, codebook.codes).amin(dim=1).max() < 0.05  # a code at every corner


@pytest.mark.parametrize("inputs, distinct", [(300, 5), (5, 5), (300, 1), (1, 1)])
def test_a_codebook_of_more_codes_than_inputs_starts_on_the_inputs(inputs, distinct):
    torch.manual_seed(0)
    z = torch.randn(distinct, 3).repeat(inputs // distinct, 1)  # (inputs, 3)
    codebook = Codebook(16, 3).train()
    codebook.start(z)
    assert torch.cdist(z, codebook.codes).amin(dim=1).max() < 1e-2
    assert torch.cdist(codebook.codes, z).amin(dim=1).max() < 1e-2
    if distinct < inputs and distinct > 1:
        assert len(codebook.codes.unique(dim=0)) == 16
    for _ in range(3):
        quantised, _, commitment = codebook(z)
    assert torch.allclose(quantised, z, atol=1e-2) and commitment < 1e-3


def test_an_update_is_the_moving_average():
    codebook = Codebook(2, 1, decay=0.75).train()
    codebook.codes.copy_(torch.tensor([[0.0], [10.0]]))
    codebook.total.copy_(torch.tensor([[0.0], [10.0]]))
    codebook.count.fill_(1)
    codebook.started.fill_(True)
    codebook(torch.tensor([[1.0], [1.0], [8.0]]))
    # code 0: (0.75 * 0 + 0.25 * 2) / (0.75 * 1 + 0.25 * 2)
    # code 1: (0.75 * 10 + 0.25 * 8) / (0.75 + 0.25)
    assert codebook.codes.flatten().tolist() == pytest.approx([0.4, 9.5])


@pytest.mark.parametrize("n", [3, 3000])
def test_a_code_used_less_than_a_tenth_of_an_even_share_is_replaced(n):
    codebook = Codebook(10, 1, decay=1.0).train()  # uses stay as they are written here
    codebook.codes.copy_(torch.arange(10.0)[:, None])
    codebook.count.copy_(torch.tensor([0.009, 0.011, *[0.1225] * 8]))  # an even share is 0.1
    codebook.total.copy_(codebook.codes * codebook.count[:, None])
    codebook.update(torch.full((n, 1), 50.0), torch.full((n,), 9))
    assert codebook.codes.flatten().tolist() == pytest.approx([50, *range(1, 10)])
    count = [0.1, 0.011, *[0.1225] * 8]  # the new code starts with an even share
    assert codebook.count.tolist() == pytest.approx(count, rel=1e-3)


def test_dead_codes_are_replaced():
    torch.manual_seed(0)
    codebook = Codebook(16, 3, decay=0.8).train()
    codebook(clusters())
    codebook.codes[8:] = 100.0  # half of the codes where nothing comes near
    codebook.total[8:] = 100.0 * codebook.count[8:, None]
    for seed in range(60):
        codebook(clusters(seed=seed))
    assert codebook.codes.abs().max() < 2
    assert len(codebook.nearest(clusters(5000)).unique()) >= 14


def test_the_gradient_goes_straight_through_and_the_commitment_pulls():
    codebook = Codebook(4, 3)
    codebook.codes.copy_(torch.randn(4, 3))
    z = torch.randn(10, 3, requires_grad=True)
    quantised, index, commitment = codebook.eval()(z)
    assert torch.allclose(quantised, codebook.codes[index], atol=1e-6)
    assert torch.equal(index, torch.cdist(z, codebook.codes).argmin(dim=1))
    quantised.sum().backward(retain_graph=True)
    assert torch.equal(z.grad, torch.ones(10, 3))
    z.grad = None
    commitment.backward()
    assert torch.allclose(z.grad, 2 * (z - codebook.codes[index]).detach() / 30, atol=1e-6)


def test_training_learns_to_rebuild_and_the_file_holds_the_same_tokenizer(tmp_path):
    random = np.random.default_rng(0)
    frames = np.zeros((200, 32, 32, 3), np.uint8)
    for frame in frames:  # a bright square on one of two grounds
        frame[:] = 60 * random.integers(1, 3)
        y, x = random.integers(0, 24, 2)
        frame[y:y + 8, x:x + 8] = (250, 200, 30)
    tokenizer = vqvae.train_tokenizer(frames, 64, 150, 32, 2e-3, 0, torch.device("cpu"))
    measures = vqvae.measure(tokenizer, frames)
    mean = frames.mean((0, 1, 2))
    flat = 10 * np.log10(4 / (((frames - mean) / 127.5) ** 2).mean())  # PSNR of the mean colour
    assert measures["psnr"] > flat + 8 and measures["codes_used"] > 0.8
    tokens = tokenizer.encode(torch.from_numpy(frames))
    assert tokens.shape == (200, 4, 4) and tokens.dtype == torch.int64
    assert tokens.max() < tokenizer.vocab_size == 64
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == frames.shape and decoded.dtype == torch.uint8
    vqvae.save_tokenizer(tokenizer, tmp_path / "t.pt")
    again = vqvae.load_tokenizer(tmp_path / "t.pt")
    assert torch.equal(again.encode(frames), tokens)


def test_tokens_are_local():
    """A token depends on the pixels of its patch only."""
    tokenizer = VQVAE(codes=64).eval()
    tokenizer.codebook.codes.normal_()
    frames = torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8)
    other = frames.clone()
    other[:, 8:16, 16:24] = 255 - other[:, 8:16, 16:24]
    differs = tokenizer.encode(frames) != tokenizer.encode(other)
    differs[0, 1, 2] = False
    assert not differs.any()


def test_train_and_tokenize_from_the_command_line(tmp_path, write_video):
    for i in range(5):
        write_video(tmp_path / f"videos/sub {i % 2}/v{i}.mp4", range(0, 200, 20 + 5 * i))
    (tmp_path / "videos/broken.mp4").write_bytes(b"no video")
    trained = run(tmp_path, "train", "--videos", "videos", "--out", "new/t.pt", "--steps", 5,
                  "--codes", 32, "--frame-size", 32, "--fps", 8, script="vqvae.py")
    assert trained.returncode == 0 and "PSNR" in trained.stdout
    assert "skipped videos/broken.mp4" in trained.stdout
    argv = ["tokenize", "--videos", "videos", "--tokenizer", "new/t.pt", "--out", "s",
            "--frame-size", 32, "--views", "test", "--fps"]
    done = call(vqvae, *argv, 8, place=tmp_path)
    assert done.returncode == 0 and "5 videos tokenised, 1 could not be decoded" in done.stdout
    assert "broken.mp4" in (tmp_path / "s/errors.txt").read_text()
    store, tokenizer = TokenStore(tmp_path / "s"), vqvae.load_tokenizer(tmp_path / "new/t.pt")
    for i in range(5):
        views = read_views(tmp_path / "videos" / store.name(i), 8, 32, data.views_for("test", 32))
        for view in range(3):
            assert np.array_equal(store.tokens(i, view), tokenizer.encode(views[view]).numpy())
    other = call(vqvae, *argv, 4, place=tmp_path)
    assert other.returncode == 2 and len(other.stderr.splitlines()) == 1
    assert "fps 8.0, not 4.0" in other.stderr
    assert len(TokenStore(tmp_path / "s")) == 5


def test_videos_of_one_colour_train_a_tokenizer_of_many_codes(tmp_path, write_video):
    for i in range(3):
        # the crop cuts the white stripe off
        write_video(tmp_path / f"videos/{i}.mp4", [100] * 10, width=128)
    done = call(vqvae, "train", "--videos", tmp_path / "videos", "--out", tmp_path / "t.pt",
                "--codes", 512, "--steps", 60, "--frame-size", 16, "--fps", 8, "--device", "cpu")
    assert done.returncode == 0 and "perplexity 1," in done.stdout
    tokenizer = vqvae.load_tokenizer(tmp_path / "t.pt")
    frame = np.full((1, 16, 16, 3), 100, np.uint8)
    assert tokenizer.codebook.codes.isfinite().all()
    assert tokenizer.decode(tokenizer.encode(frame)).float().mean() == pytest.approx(100, abs=10)


@pytest.mark.parametrize("argv, reason", [
    (["train"], "say where the videos are"),
    (["train", "--videos", "few/v.mp4"], "is a file: give its folder"),
    (["tokenize", "--videos", "few", "--dataset", "own", "--root", "few"], "give one of them"),
    (["trian", "--videos", "few"], "do you mean vqvae.py train?"),
    (["train", "--videos", "nowhere"], "no folder nowhere"),
    (["train", "--videos", "empty"], "no video file below"),
    (["train", "--frame-size", "20"], "multiple of 8"),
    (["train", "--videos", "few"], "too few"),
    (["tokenize", "--videos", "few", "--tokenizer", "t.pt"], "no file t.pt"),
    (["tokenize", "--videos", "few", "--tokenizer", "encoder.pkl"], "encoder.pkl"),
    (["tokenize", "--videos", "few", "--tokenizer", "few/v.mp4"],
     "few/v.mp4 is damaged, or no checkpoint"),
    (["tokenize", "--videos", "few", "--tokenizer", "tensor.pt"],
     "tensor.pt holds no dictionary of named tensors"),
    (["tokenize", "--videos", "few", "--tokenizer", "tensors.pt"], "tensors.pt holds no tokenizer"),
    (["tokenize", "--dataset", "ucf101", "--root", "empty"], "ucfTrainTestlist")])
def test_an_error_that_the_user_can_mend_is_one_line(tmp_path, write_video, argv, reason):
    (tmp_path / "empty").mkdir()
    write_video(tmp_path / "few/v.mp4", [100] * 4)
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "tensors.pt")
    done = call(vqvae, *argv, place=tmp_path)
    assert done.returncode == 2 and reason in done.stderr
    lines = done.stderr.splitlines()
    assert len([line for line in lines if not line.startswith("reading frames")]) == 1


def test_an_error_of_a_library_keeps_its_traceback(tmp_path, write_video, monkeypatch):
    def fail(path):
        raise ValueError("a bug")
    write_video(tmp_path / "v.mp4", [100] * 4)
    monkeypatch.setattr(vqvae, "load_tokenizer", fail)
    with pytest.raises(ValueError, match="a bug"):
        call(vqvae, "tokenize", "--videos", tmp_path)


# ---------------------------------------------------------------- nothing lost or silently wrong


def train(videos, *argv):
    return ["train", "--videos", videos, "--codes", 16, "--frame-size", 16, "--fps", 8,
            "--device", "cpu", *argv]


@pytest.fixture(scope="module")
def videos(tmp_path_factory, write_video):
    folder = tmp_path_factory.mktemp("vqvae")
    for i in range(3):
        write_video(folder / f"{i}.mp4", range(0, 240, 10 + i))
    return folder


def test_an_existing_tokenizer_is_not_overwritten(tmp_path, videos):
    (tmp_path / "t.pt").write_bytes(b"of a month's tokens")
    done = call(vqvae, *train(videos), "--steps", 3, "--out", tmp_path / "t.pt")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "t.pt exists: choose another name" in done.stderr
    assert (tmp_path / "t.pt").read_bytes() == b"of a month's tokens"


@pytest.mark.parametrize("lr, steps", [(1e30, 1), (1e4, 1), (1e30, 300)])
def test_a_tokenizer_that_went_to_infinity_is_not_saved(tmp_path, videos, steps, lr):
    """After 300 steps of the largest rate the encoder gives NaNs before the end."""
    done = call(vqvae, *train(videos), "--out", tmp_path / "t.pt", "--lr", lr, "--steps", steps,
                "--batch", 4)
    assert done.returncode == 2 and "lower --lr" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "t.pt").exists()


def test_a_tokenizer_is_saved_last(tmp_path, videos, monkeypatch):
    """A kill before that makes all of it again, a kill after it loses nothing."""
    calls = []
    for name in ("draw_tokenizer", "save_tokenizer"):
        monkeypatch.setattr(vqvae, name, lambda *_, name=name: calls.append(name))
    argv = train(videos, "--out", tmp_path / "t.pt", "--steps", 1, "--batch", 4)
    assert call(vqvae, *argv).returncode == 0
    assert calls == ["draw_tokenizer", "draw_tokenizer", "save_tokenizer"]


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, videos, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(decoding, "_ffmpeg", None)
    vqvae.save_tokenizer(VQVAE(codes=16).eval(), tmp_path / "t.pt")
    for argv in (train(videos),
                 ["tokenize", "--videos", videos, "--tokenizer", tmp_path / "t.pt"]):
        done = call(vqvae, *argv, "--out", tmp_path / "file/sub")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert f"cannot write {tmp_path}/file" in done.stderr


def test_under_torchrun_one_process_trains(tmp_path, videos):
    done = run(tmp_path, *train(videos, "--steps", 3), "--out", "t.pt", script="vqvae.py",
               under=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"])
    assert done.returncode == 0 and done.stdout.count("reconstruction error") == 1, done.stderr
    assert done.stderr.count("training the tokenizer:   0%") == 1
    assert vqvae.load_tokenizer(tmp_path / "t.pt").vocab_size == 16


def test_check_reads_all_tokens_of_a_store(tmp_path, videos):
    vqvae.save_tokenizer(VQVAE(codes=16).eval(), tmp_path / "t.pt")
    call(vqvae, "tokenize", "--videos", videos, "--tokenizer", tmp_path / "t.pt",
         "--frame-size", 16, "--fps", 8, "--views", "test", "--out", tmp_path / "s")
    done = call(vqvae, "check", tmp_path / "s")
    assert done.returncode == 0
    assert "s: 3 videos of 66 frames, all tokens are as they were written" in done.stdout
    part, = (tmp_path / "s").glob("part-*.npy")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    done = call(vqvae, "check", tmp_path / "s")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{part} holds other tokens than were written: delete this file" in done.stderr
    done = call(vqvae, "check")
    assert done.returncode == 2 and "no finished token store of this version at ." in done.stderr
