"""Each real dataset's layout, written as its site gives it out: from video files to accuracy by the command lines."""
import json
import sys
from dataclasses import asdict

import pytest
import torch

import data
import finetune
import pretrain
import training
import vqvae
from conftest import TINY, flags
from transformer import TransformerConfig


def ucf101(root, video):
    (root / "ucfTrainTestlist").mkdir(parents=True)
    (root / "ucfTrainTestlist/classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
    train = [("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", 1), ("YoYo/v_YoYo_g08_c01.avi", 2),
             ("YoYo/v_YoYo_g08_c02.avi", 2)]
    test = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "YoYo/v_YoYo_g01_c01.avi"]
    for n in (1, 2, 3):
        (root / f"ucfTrainTestlist/trainlist0{n}.txt").write_text("".join(f"{p} {c}\n" for p, c in train[n - 1:]))
        (root / f"ucfTrainTestlist/testlist0{n}.txt").write_text("".join(f"{p}\n" for p in test))
    for name in [p for p, _ in train] + test:
        video(root / "UCF-101" / name, codec="mpeg4")
    return {"train": [0, 1, 1], "test": [0, 1], "train2": [1, 1]}


def hmdb51(root, video):
    folder = root / "testTrainMulti_7030_splits"
    folder.mkdir(parents=True)
    for label, name in enumerate(("brush_hair", "wave")):
        lines = {f"{name} #1 (a&b;c)_0.avi": 1, f"{name}_1.avi": 2, f"{name}_2.avi": 0, f"{name}_3.avi": 1}
        for n in (1, 2, 3):
            (folder / f"{name}_test_split{n}.txt").write_text("".join(f"{v} {part} \n" for v, part in lines.items()))
        for v in lines:
            video(root / name / v, codec="mpeg4")
    return {"train": [0, 0, 1, 1], "test": [0, 1], "test3": [0, 1]}


def ssv2(root, video, prefix=""):
    root.mkdir(parents=True)
    classes = {"Approaching something with your camera": "1", "Putting something on a surface": "0"}
    (root / f"{prefix}labels.json").write_text(json.dumps(classes))

    def entries(*pairs):
        return json.dumps([{"id": str(i), "label": "putting a cup on a table", "template": t, "placeholders": ["a cup"]}
                           for i, t in pairs])
    put, near = "Putting [something] on a surface", "Approaching [something] with your camera"
    (root / f"{prefix}train.json").write_text(entries((1, put), (2, near), (3, put)))
    (root / f"{prefix}validation.json").write_text(entries((4, near), (5, put)))
    (root / f"{prefix}test.json").write_text(json.dumps([{"id": "6"}]))
    for i in range(1, 7):
        video(root / f"20bn-something-something-v2/{i}.webm", codec="libvpx-vp9")
    return {"train": [0, 1, 0], "val": [1, 0], "test": [None]}


def diving48(root, video):
    root.mkdir(parents=True)
    (root / "Diving48_vocab.json").write_text(json.dumps([["Back", "15som", "05Twis", "FREE"], ["Forward", "PIKE"]]))

    def entries(*triples):
        return json.dumps([{"vid_name": name, "label": label, "start_frame": 0, "end_frame": end}
                           for name, label, end in triples])
    (root / "Diving48_V2_train.json").write_text(entries(("a_0", 0, 16), ("b_1", 1, 8), ("c_2", 1, 16)))
    (root / "Diving48_V2_test.json").write_text(entries(("d_3", 1, 16), ("e_4", 0, 16)))
    for name in ("a_0", "b_1", "c_2", "d_3", "e_4"):
        video(root / f"rgb/{name}.mp4")
    return {"train": [0, 1, 1], "test": [1, 0]}


def kinetics400(root, video):
    root.mkdir(parents=True)
    header = "label,youtube_id,time_start,time_end,split\n"
    (root / "train.csv").write_text(header + "abseiling,--aID,3,13,train\nwater skiing,bID,10,20,train\n"
                                    "water skiing,cID,0,10,train\nabseiling,goneID,1,11,train\n")
    (root / "val.csv").write_text(header + '"water skiing",dID,7,17,val\nabseiling,eID,5,15,val\n')
    for name in ("train/abseiling/--aID_000003_000013", "train/water skiing/bID_000010_000020",
                 "train/water_skiing/cID_000000_000010", "val/dID_000007_000017", "val/eID_000005_000015"):
        video(root / f"{name}.mp4")
    return {"train": [0, 1, 1], "val": [1, 0]}


LAYOUTS = {"ucf101": ucf101, "hmdb51": hmdb51, "ssv2": ssv2, "diving48": diving48, "kinetics400": kinetics400}


@pytest.fixture
def video(write_video):
    """Sixteen frames of rising brightness, 8 a second."""
    def write(path, codec="libx264"):
        return write_video(path, range(0, 240, 15), width=80, codec=codec, options=())
    return write


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An untrained tokenizer of 32 codes and an untrained backbone for 4 x 4 tokens."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = vqvae.VQVAE(codes=32, width=16).eval()
    tokenizer.codebook.codes.normal_(std=0.1)
    vqvae.save_tokenizer(tokenizer, place / "tokenizer.pt")
    config = TransformerConfig(1, 16, 2, 8, 32, 3, 4, 4, 32)
    training.save(place / "last.pt", {"model": pretrain.Vimpac(config, 16, 2).state_dict(), "transformer": asdict(config)})
    return place


def call(main, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
    main()


def tokenize(monkeypatch, models, dataset, root, split, views, out):
    call(vqvae.main, monkeypatch, "tokenize", "--dataset", dataset, "--root", root, "--split", split, "--views", views,
         "--tokenizer", models / "tokenizer.pt", "--fps", 8, "--frame-size", 32, "--out", out)
    return data.TokenStore(out)


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_from_files_to_accuracy(tmp_path, monkeypatch, capsys, video, models, dataset):
    expected = LAYOUTS[dataset](tmp_path / "root", video)
    for split, labels in expected.items():
        listed = data.list_videos(dataset, tmp_path / "root", split)
        assert [label for _, label in listed] == labels
    test = "test" if dataset in ("ucf101", "hmdb51", "diving48") else "val"
    store = tokenize(monkeypatch, models, dataset, tmp_path / "root", "train", "train", tmp_path / "tokens/train")
    assert list(store.labels()) == expected["train"] and store.views == (6 if dataset == "ssv2" else 12)
    tested = tokenize(monkeypatch, models, dataset, tmp_path / "root", test, "test", tmp_path / "tokens/test")
    views = 1 if dataset == "ssv2" else 3
    assert list(tested.labels()) == expected[test] and tested.views == views
    if dataset == "diving48":  # the second dive ends with frame 8 of 16
        assert list(store.index["frames"]) == [16, 8, 16]
    if dataset == "kinetics400":
        assert "1 of 4 listed videos are not on this disk" in capsys.readouterr().err
    split = ["--split", 1] if dataset in ("ucf101", "hmdb51") else []
    call(finetune.main, monkeypatch, "--dataset", dataset, *split, "--data", tmp_path / "tokens", "--checkpoint",
         models / "last.pt", "--steps", 2, "--out", tmp_path / "run", "--workers", 0, "--device", "cpu")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("top-1 ") and last.endswith(f"({len(expected[test])} videos x {10 * views} views)")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["lr"], config["weight_decay"]) == (1e-4, 0.01)


def test_howto100m_is_every_video_found(tmp_path, monkeypatch, capsys, video, models):
    video(tmp_path / "root/a/ID1.mp4")
    video(tmp_path / "root/b/c/ID2.webm", codec="libvpx-vp9")
    store = tokenize(monkeypatch, models, "howto100m", tmp_path / "root", "train", "pretrain", tmp_path / "tokens")
    assert [store.name(i) for i in range(2)] == ["a/ID1.mp4", "b/c/ID2.webm"] and store.label_sets() == []
    call(pretrain.main, monkeypatch, "--data", tmp_path / "tokens", "--steps", 2, "--out", tmp_path / "run",
         *flags(TINY))
    assert (tmp_path / "run/last.pt").is_file()


def test_older_releases_of_something_something(tmp_path, video):
    expected = ssv2(tmp_path / "root", video, prefix="something-something-v2-")
    assert [label for _, label in data.list_videos("ssv2", tmp_path / "root", "val")] == expected["val"]


@pytest.mark.parametrize("dataset, lost", [
    ("ucf101", "ucfTrainTestlist/classInd.txt"), ("ucf101", "ucfTrainTestlist/trainlist01.txt"),
    ("hmdb51", "testTrainMulti_7030_splits"), ("ssv2", "labels.json"), ("diving48", "Diving48_vocab.json"),
    ("kinetics400", "train.csv")])
def test_a_missing_annotation_is_named(tmp_path, video, dataset, lost):
    LAYOUTS[dataset](tmp_path / "root", video)
    (tmp_path / "root" / lost).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=lost):
        data.list_videos(dataset, tmp_path / "root", "train")


def test_what_the_lists_get_wrong_is_named(tmp_path, video):
    ucf101(tmp_path / "ucf", video)
    with pytest.raises(ValueError, match="train4"):
        data.list_videos("ucf101", tmp_path / "ucf", "train4")
    (tmp_path / "ucf/ucfTrainTestlist/trainlist01.txt").write_text("Juggling/v.avi 3\n")
    with pytest.raises(ValueError, match="Juggling"):
        data.list_videos("ucf101", tmp_path / "ucf", "train1")
    (tmp_path / "ucf/UCF-101").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="UCF-101"):
        data.list_videos("ucf101", tmp_path / "ucf", "test1")
    with pytest.raises(ValueError, match="kinetics400"):
        data.list_videos("ucf102", tmp_path / "ucf", "train")


def test_table_4_s_fine_tuning_numbers():
    for dataset, epochs, fps, updates, videos in (("ssv2", 22, 4, 29000, 168_913), ("diving48", 50, 4, 5800, 15_027),
                                                  ("ucf101", 50, 2, 3700, 9_537), ("hmdb51", 50, 4, 1400, 3_570),
                                                  ("kinetics400", 30, 2, 48000, 205_418)):
        config = training.parse(finetune.Config, ["--dataset", dataset], "", finetune.DATASETS, chosen_by="dataset")
        assert (config.epochs, config.fps, config.batch, config.warmup, config.weight_decay) == (epochs, fps, 128, 0.1, 0.01)
        assert config.epochs * videos / config.batch == pytest.approx(updates, rel=0.02)


def test_views_are_those_of_the_paper():
    assert len(set(vqvae.views_for("train", 128))) == 12 and {v[0] for v in vqvae.views_for("train", 128)} == {128, 160}
    assert not any(flip for _, _, flip in vqvae.views_for("train", 128, "ssv2"))
    assert vqvae.views_for("test", 128, "ssv2") == [(128, "center", False)] == vqvae.views_for("pretrain", 128)
    assert len(vqvae.views_for("test", 128)) == 3
