"""Each real dataset's layout, as its site publishes it: from video files to accuracy."""
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import TINY, call, flags
from hypothesis import given
from hypothesis import strategies as st

import data
import finetune
import pretrain
import vqvae
from plumbing.checkpoints import save_checkpoint
from plumbing.cli import UserError, parse
from plumbing.datasets import (
    DATASETS,
    Dataset,
    class_names,
    frame_spans,
    list_videos,
    own_splits,
    videos_to_pretrain_on,
)
from plumbing.lists import read_lines, split_off
from plumbing.store import TokenStore
from transformer import TransformerConfig


def ucf101(root, video):
    (root / "ucfTrainTestlist").mkdir(parents=True)
    (root / "ucfTrainTestlist/classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
    train = [("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", 1), ("YoYo/v_YoYo_g08_c01.avi", 2),
             ("YoYo/v_YoYo_g08_c02.avi", 2)]
    test = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "YoYo/v_YoYo_g01_c01.avi"]
    for n in (1, 2, 3):
        lines = [f"{path} {number}\n" for path, number in train[n - 1:]]
        (root / f"ucfTrainTestlist/trainlist0{n}.txt").write_text("".join(lines))
        (root / f"ucfTrainTestlist/testlist0{n}.txt").write_text("".join(f"{p}\n" for p in test))
    for name in [p for p, _ in train] + test:
        video(root / "UCF-101" / name, codec="mpeg4")
    return {"train": [0, 1, 1], "test": [0, 1], "train2": [1, 1]}


def hmdb51(root, video):
    folder = root / "testTrainMulti_7030_splits"
    folder.mkdir(parents=True)
    for label, name in enumerate(("brush_hair", "wave")):
        parts = {f"{name} #1 (a&b;c)_0.avi": 1, f"{name}_1.avi": 2, f"{name}_2.avi": 0,
                 f"{name}_3.avi": 1}
        lines = [f"{file} {part} \n" for file, part in parts.items()]
        for n in (1, 2, 3):
            (folder / f"{name}_test_split{n}.txt").write_text("".join(lines))
        for file in parts:
            video(root / name / file, codec="mpeg4")
    return {"train": [0, 0, 1, 1], "test": [0, 1], "test3": [0, 1]}


def ssv2(root, video, prefix=""):
    root.mkdir(parents=True)
    classes = {"Approaching something with your camera": "1", "Putting something on a surface": "0"}
    (root / f"{prefix}labels.json").write_text(json.dumps(classes))

    def entries(*pairs):
        rest = {"label": "putting a cup on a table", "placeholders": ["a cup"]}
        return json.dumps([{"id": str(i), "template": template, **rest} for i, template in pairs])

    put, near = "Putting [something] on a surface", "Approaching [something] with your camera"
    (root / f"{prefix}train.json").write_text(entries((1, put), (2, near), (3, put)))
    (root / f"{prefix}validation.json").write_text(entries((4, near), (5, put)))
    (root / f"{prefix}test.json").write_text(json.dumps([{"id": "6"}]))
    for i in range(1, 7):
        video(root / f"20bn-something-something-v2/{i}.webm", codec="libvpx-vp9")
    return {"train": [0, 1, 0], "val": [1, 0], "test": [None]}


def diving48(root, video):
    root.mkdir(parents=True)
    vocabulary = [["Back", "15som", "05Twis", "FREE"], ["Forward", "PIKE"]]
    (root / "Diving48_vocab.json").write_text(json.dumps(vocabulary))

    def entries(*triples):
        return json.dumps([{"vid_name": name, "label": label, "start_frame": 0, "end_frame": end}
                           for name, label, end in triples])

    train = entries(("a_0", 0, 16), ("b_1", 1, 8), ("c_2", 1, 16))
    (root / "Diving48_V2_train.json").write_text(train)
    (root / "Diving48_V2_test.json").write_text(entries(("d_3", 1, 16), ("e_4", 0, 16)))
    for name in ("a_0", "b_1", "c_2", "d_3", "e_4"):
        video(root / f"rgb/{name}.mp4")
    return {"train": [0, 1, 1], "test": [1, 0]}


def kinetics400(root, video):
    root.mkdir(parents=True)
    header = "label,youtube_id,time_start,time_end,split\n"
    (root / "train.csv").write_text(
        header + "abseiling,--aID,3,13,train\nwater skiing,bID,10,20,train\n"
                 "water skiing,cID,0,10,train\nabseiling,goneID,1,11,train\n")
    (root / "val.csv").write_text(header + '"water skiing",dID,7,17,val\nabseiling,eID,5,15,val\n')
    (root / "test.csv").write_text("youtube_id,time_start,time_end,split\nfID,2,12,test\n")
    for name in ("train/abseiling/--aID_000003_000013", "train/water skiing/bID_000010_000020",
                 "train/water_skiing/cID_000000_000010", "val/dID_000007_000017",
                 "val/eID_000005_000015", "test/fID_000002_000012"):
        video(root / f"{name}.mp4")
    return {"train": [0, 1, 1], "val": [1, 0], "test": [None]}


LAYOUTS = {"ucf101": ucf101, "hmdb51": hmdb51, "ssv2": ssv2, "diving48": diving48,
           "kinetics400": kinetics400}


@pytest.fixture
def video(write_video):
    """Sixteen frames of rising brightness, 8 a second."""
    def write(path, codec="libx264"):
        return write_video(path, range(0, 240, 15), width=80, codec=codec, options=())

    return write


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An untrained tokenizer of 32 codes and an untrained backbone for 4 x 4 tokens."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = vqvae.VQVAE(codes=32, width=16).eval()
    tokenizer.codebook.codes.normal_(std=0.1)
    vqvae.save_tokenizer(tokenizer, folder / "tokenizer.pt")
    config = TransformerConfig(1, 16, 2, 8, 32, 3, 4, 4, 32)
    model = pretrain.Vimpac(config, 16, 2)
    content = {"model": model.state_dict(), "transformer": asdict(config)}
    save_checkpoint(folder / "last.pt", content)
    return folder


def succeed(module, *argv):
    done = call(module, *argv)
    assert done.returncode == 0, done.stderr
    return done


def tokenize(models, dataset, root, split, views, out):
    done = succeed(vqvae, "tokenize", "--dataset", dataset, "--root", root, "--split", split,
                   "--views", views, "--tokenizer", models / "tokenizer.pt", "--fps", 8,
                   "--frame-size", 32, "--out", out)
    return TokenStore(out), done.stderr


def labels_of(dataset, root, split):
    return [label for _, label in list_videos(dataset, root, split)]


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_from_files_to_accuracy(tmp_path, video, models, dataset):
    root, expected = tmp_path / "root", LAYOUTS[dataset](tmp_path / "root", video)
    for split, labels in expected.items():
        assert labels_of(dataset, root, split) == labels
    test = "test" if dataset in ("ucf101", "hmdb51", "diving48") else "val"
    store, warnings = tokenize(models, dataset, root, "train", "train", tmp_path / "tokens/train")
    assert list(store.labels()) == expected["train"]
    assert store.views == (6 if dataset == "ssv2" else 12)
    tested, _ = tokenize(models, dataset, root, test, "test", tmp_path / "tokens/test")
    views = 1 if dataset == "ssv2" else 3
    assert list(tested.labels()) == expected[test] and tested.views == views
    if dataset == "diving48":  # the second dive ends with frame 8 of 16
        assert list(store.frames) == [16, 8, 16]
    assert ("1 of 4 listed videos are not on this disk" in warnings) == (dataset == "kinetics400")
    split = ["--split", 1] if dataset in ("ucf101", "hmdb51") else []
    done = succeed(finetune, "--dataset", dataset, *split, "--data", tmp_path / "tokens",
                   "--checkpoint", models / "last.pt", "--steps", 2, "--out", tmp_path / "run",
                   "--workers", 0, "--device", "cpu")
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("top-1 ")
    assert last.endswith(f"({len(expected[test])} videos x {2 * views} views)")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["lr"], config["weight_decay"]) == (1e-4, 0.01)


def test_howto100m_is_every_video_below_the_folder(tmp_path, video, models):
    video(tmp_path / "root/a/ID1.mp4")
    video(tmp_path / "root/b/c/ID2.webm", codec="libvpx-vp9")
    store, _ = tokenize(models, "howto100m", tmp_path / "root", "train", "pretrain",
                        tmp_path / "tokens")
    assert [store.name(i) for i in range(2)] == ["a/ID1.mp4", "b/c/ID2.webm"]
    assert store.label_sets() == []
    succeed(pretrain, "--data", tmp_path / "tokens", "--frame-size", 32, "--steps", 2,
            "--out", tmp_path / "run", *flags(TINY))
    assert (tmp_path / "run/last.pt").is_file()


def test_older_releases_of_something_something(tmp_path, video):
    expected = ssv2(tmp_path / "root", video, prefix="something-something-v2-")
    assert labels_of("ssv2", tmp_path / "root", "val") == expected["val"]


@pytest.mark.parametrize("dataset, lost", [
    ("ucf101", "ucfTrainTestlist/classInd.txt"), ("ucf101", "ucfTrainTestlist/trainlist01.txt"),
    ("hmdb51", "testTrainMulti_7030_splits"), ("ssv2", "labels.json"),
    ("diving48", "Diving48_vocab.json"), ("kinetics400", "train.csv")])
def test_a_missing_annotation_is_named(tmp_path, video, dataset, lost):
    LAYOUTS[dataset](tmp_path / "root", video)
    (tmp_path / "root" / lost).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=lost):
        list_videos(dataset, tmp_path / "root", "train")


KINETICS = "label,youtube_id,time_start,time_end\n"


@pytest.mark.parametrize("dataset, split, annotation, content, reason", [
    ("ucf101", "test1", "ucfTrainTestlist/testlist01.txt", "YoYo/gone.avi\n",
     "none of the 1 .*UCF-101/YoYo/gone.avi"),
    ("ucf101", "train", "ucfTrainTestlist/trainlist01.txt", "Judo/v.avi 3\n",
     "'Judo' is not among the 2 classes"),
    ("ssv2", "val", "validation.json", '[{"id": "4", "template": "Eating [something]"}]',
     "'Eating something'"),
    ("diving48", "test", "Diving48_V2_test.json", '[{"vid_name": "d_3", "label": 2}]',
     "label 2 is not among the 2"),
    ("kinetics400", "val", "val.csv", f"{KINETICS}yoga,dID,7,17\n", "'yoga'")])
def test_an_error_in_a_list_is_named(tmp_path, video, dataset, split, annotation, content, reason):
    LAYOUTS[dataset](tmp_path / "root", video)
    (tmp_path / "root" / annotation).write_text(content)
    with pytest.raises(UserError, match=reason):
        list_videos(dataset, tmp_path / "root", split)


@pytest.mark.parametrize("dataset, annotation, content, reason", [
    ("ucf101", "ucfTrainTestlist/classInd.txt", "1 ApplyEyeMakeup\n2\n",
     "every line is `number class`, not '2'"),
    ("hmdb51", "testTrainMulti_7030_splits/wave_test_split1.txt", "wave_1.avi 1\nwave_2.avi",
     "not 'wave_2.avi'"),
    ("ssv2", "train.json", '[{"id": "1", "templ', "not whole, or no JSON"),
    ("ssv2", "train.json", '[{"template": "Putting [something]"}]', "entry 1 has no id"),
    ("ssv2", "labels.json", '["Putting"]', "a dict is expected"),
    ("ssv2", "labels.json", '{"Putting": "0x"}', "whole numbers"),
    ("diving48", "Diving48_V2_train.json",
     '[{"vid_name": "a_0", "label": 0}, {"vid_name": "b_1"}]', "entry 2 .*label"),
    ("diving48", "Diving48_V2_train.json",
     '[{"vid_name": "a_0", "label": 0, "end_frame": "8,movie=x"}]', "end_frame"),
    ("kinetics400", "train.csv", f"{KINETICS}yoga,dID,7\n", "row 1 has no time_end"),
    ("kinetics400", "train.csv", f"{KINETICS}yoga,dID,7,1x\n", "'dID' has no start")])
def test_a_damaged_annotation_is_named(tmp_path, video, dataset, annotation, content, reason):
    LAYOUTS[dataset](tmp_path / "root", video)
    path = tmp_path / "root" / annotation
    path.write_text(content)
    with pytest.raises(UserError, match=reason) as error:
        list_videos(dataset, tmp_path / "root", "train")
        frame_spans(dataset, tmp_path / "root", "train")
    assert str(error.value).startswith(str(tmp_path)) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("mark", ["classInd", "trainlist01"])
def test_a_byte_order_mark_in_a_dataset_s_own_list_loses_nothing(tmp_path, video, mark):
    expected = ucf101(tmp_path / "root", video)
    path = tmp_path / f"root/ucfTrainTestlist/{mark}.txt"
    path.write_text("\ufeff" + path.read_text())
    assert labels_of("ucf101", tmp_path / "root", "train") == expected["train"]


def test_an_unknown_dataset_or_split_is_refused_with_the_existing_ones_named(tmp_path):
    with pytest.raises(UserError, match="'ucf102': choose one of .*kinetics400"):
        list_videos("ucf102", tmp_path, "train")
    with pytest.raises(UserError, match="no split 'train4': choose one of train1, test1, .*test3"):
        list_videos("ucf101", tmp_path, "train4")


# ---------------------------------------------------------------- a user's own lists


@pytest.fixture
def write_lists(tmp_path):
    """Writes lists, {file: content}, beside four files that stand for videos -> the folder."""
    for name in ("a b/c.mp4", "c.mp4", "d.mp4", "e.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def write(**lists):
        for name, content in lists.items():
            (tmp_path / f"{name}.txt").write_text(content)
        return tmp_path
    return write


def test_labels_that_are_numbers_are_taken_as_they_are(write_lists):
    root = write_lists(train="a b/c.mp4 7\n\nd.mp4 0\n")
    expected = [(str(root / "a b/c.mp4"), 7), (str(root / "d.mp4"), 0)]
    assert list_videos("own", root, "train") == expected


def test_labels_that_are_words_are_numbered_alike_in_every_split(write_lists):
    root = write_lists(train="c.mp4 walk\nd.mp4 jump\n", test="e.mp4 walk\n")
    assert [label for _, label in list_videos("own", root, "train")] == [1, 0]
    assert [label for _, label in list_videos("own", root, "test")] == [1]
    write_lists(classes="walk\njump\n")
    assert [label for _, label in list_videos("own", root, "train")] == [0, 1]


@pytest.mark.parametrize("lists, reason", [
    (dict(train="c.mp4 walk\n", test="e.mp4 swim\n"), "'swim' is not among the 1 classes"),
    (dict(train="c.mp4 0\n", test="e.mp4 1\n", classes="walk\n"),
     "label 1 is not among the 1 classes"),
    (dict(other="c.mp4 walk\n", test="e.mp4 swim\n"),
     "write the classes, one a line, to .*classes.txt"),
    (dict(train="c.mp4 0\n", test="e.mp4\n"), "test.txt: every line is"),
    (dict(train="c.mp4 0\n"), "no .*test.txt")])
def test_an_error_in_a_user_s_list_is_named(write_lists, lists, reason):
    with pytest.raises(UserError, match=reason):
        list_videos("own", write_lists(**lists), "test")


def test_a_byte_order_mark_loses_no_video(write_lists):
    root = write_lists(train="\ufeffc.mp4 1\nd.mp4 0\n", classes="")
    assert [label for _, label in list_videos("own", root, "train")] == [1, 0]
    write_lists(train="\ufeffc.mp4 jump\nd.mp4 walk\n", classes="\ufeffjump\nwalk\n")
    assert [label for _, label in list_videos("own", root, "train")] == [0, 1]


def test_a_name_may_hold_any_bytes(write_lists):
    """Bytes that are not UTF-8, and characters that str.splitlines splits at."""
    root = write_lists(train="")
    names = [b"caf\xe9.mp4", b"\xe2\x80\xa8.mp4", b"a\x0b\x1c\xc2\x85b.mp4"]
    try:
        for name in names:
            (root / os.fsdecode(name)).touch()
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    (root / "train.txt").write_bytes(b"".join(name + b" 1\r\n" for name in names))
    expected = [(str(root / os.fsdecode(name)), 1) for name in names]
    assert list_videos("own", root, "train") == expected


def test_a_missing_video_is_named_whatever_bytes_its_name_holds(write_lists, capsys):
    root = write_lists(train="")
    (root / "train.txt").write_bytes(b"c.mp4 1\ncaf\xe9.mp4 1\n")
    assert len(list_videos("own", root, "train")) == 1
    assert "1 of 2 listed videos are not on this disk, such as" in (line := capsys.readouterr().err)
    assert line.endswith("caf\\xe9.mp4\n")
    (root / "train.txt").write_bytes(b"caf\xe9.mp4 1\n")
    with pytest.raises(UserError, match=r"such as .*caf\\xe9.mp4$"):
        list_videos("own", root, "train")


def test_a_split_alone_needs_no_other(write_lists):
    assert [label for _, label in list_videos("own", write_lists(test="e.mp4 3\n"), "test")] == [3]


@pytest.mark.parametrize("lists, reason", [
    (dict(train="c.mp4 0\n\nd.mp4 1b\n"),
     r"train.txt, line 3: the label '1b' .* 0 \(train.txt, line 1\)"),
    (dict(train="c.mp4 walk\nd.mp4 3\n"), "train.txt, line 2: the label 3 .* 'walk'"),
    (dict(train="c.mp4 walk\n", other="d.mp4 1\n"),
     "train.txt, line 1: the label 'walk' .* 1 .other.txt, line 1"),
    (dict(train="c.mp4 walk\nd.mp4 run\n./c.mp4 run\n"),
     "train.txt, line 3: ./c.mp4 has the label 'run' .*'walk'"),
    (dict(train="c.mp4 0\n", val="d.mp4 1\nc.mp4 1\n"),
     "val.txt, line 2: c.mp4 has the label 1 here and 0 before")])
def test_a_label_means_the_same_in_every_list_of_a_folder(write_lists, lists, reason):
    for split in lists:
        with pytest.raises(UserError, match=reason):
            list_videos("own", write_lists(**lists), split)


def test_text_files_that_list_no_videos_do_not_count_as_lists(write_lists):
    root = write_lists(train="c.mp4 0\n", README="Videos of walks\n", unlabelled="d.mp4\n",
                       empty="")
    assert [label for _, label in list_videos("own", root, "train")] == [0]


def test_folders_are_classes(tmp_path):
    for path in ("walk/a.mp4", "run/deep/b.mp4", "run/c.avi"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert class_names("own", tmp_path) == ["run", "walk"]
    videos = [(str(Path(path).relative_to(tmp_path)), label)
              for path, label in list_videos("own", tmp_path, "train")]
    assert videos == [("run/c.avi", 0), ("run/deep/b.mp4", 0), ("walk/a.mp4", 1)]
    (tmp_path / "stray.mp4").touch()
    with pytest.raises(UserError, match="stray.mp4 is in no class's folder"):
        list_videos("own", tmp_path, "train")


def test_folders_of_splits_hold_folders_of_classes(tmp_path):
    for path in ("train/walk/a.mp4", "train/run/b.mp4", "test/walk/c.mp4"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    splits = own_splits(tmp_path)
    assert {split: [label for _, label in videos] for split, videos in splits.items()} == \
        {"train": [0, 1], "test": [1]}
    assert [Path(path).name for path in videos_to_pretrain_on(tmp_path)] == ["b.mp4", "a.mp4"]
    (tmp_path / "test/walk/again.mp4").symlink_to(tmp_path / "train/walk/a.mp4")
    assert [Path(path).name for path in videos_to_pretrain_on(tmp_path)] == ["b.mp4"]


def test_a_video_that_is_added_leaves_the_test_videos_of_a_folder(tmp_path):
    for i in range(50):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"{i % 2}/{i}.mp4").touch()
    before = own_splits(tmp_path)["test"]
    assert len(before) == 10 and {label for _, label in before} == {0, 1}  # classes named 0 and 1
    (tmp_path / "0/new.mp4").touch()
    assert len({*before} & {*own_splits(tmp_path)["test"]}) >= 9


@pytest.mark.parametrize("files, reason", [
    (["a/1.mp4", "b/2.mp4"], "one video of each class"), (["test/a/1.mp4"], "one video of each"),
    (["notes.md"], "has no videos to train on")])
def test_a_folder_that_cannot_be_divided_is_refused(tmp_path, files, reason):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=reason):
        own_splits(tmp_path)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60))
def test_a_fifth_of_each_class_is_set_apart(labels):
    videos = [(f"/v/{i}.mp4", label) for i, label in enumerate(labels)]
    train, test = split_off(videos, "/v")
    assert sorted(train + test) == sorted(videos)
    moved = [(f"/w/{i}.mp4", label) for i, label in enumerate(labels)]
    assert [path[2:] for path, _ in split_off(moved, "/w")[1]] == [path[2:] for path, _ in test]
    for label in set(labels):
        count, apart = labels.count(label), sum(of == label for _, of in test)
        assert apart == (0 if count == 1 else max(1, round(count / 5)))


@pytest.mark.parametrize("target", ["elsewhere", "videos"])
def test_links_to_folders_are_followed_and_loops_end(tmp_path, target):
    for folder in ("videos/class", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.MP4").touch()
    (tmp_path / "videos/class/up").symlink_to(tmp_path / "videos")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "videos/class")
    (tmp_path / "videos/a link").symlink_to(tmp_path / target)
    expected = [(f"{tmp_path}/videos/class/a.MP4", None)]
    if target == "elsewhere":
        expected.insert(0, (f"{tmp_path}/videos/a link/a.MP4", None))
    assert list_videos("folder", tmp_path / "videos", "") == expected


def test_kinetics_videos_may_end_in_capitals(tmp_path, video):
    expected = kinetics400(tmp_path / "root", video)
    for path in (tmp_path / "root/val").iterdir():
        path.rename(path.with_suffix(".MP4"))
    assert labels_of("kinetics400", tmp_path / "root", "val") == expected["val"]


def test_a_folder_without_videos_or_that_is_not_there_is_named(tmp_path):
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=f"no .*{root}"):
            list_videos("folder", root, "")


# ---------------------------------------------------------------- fine-tuning settings (Table 4)


@pytest.mark.parametrize("dataset, epochs, updates, videos", [
    ("ssv2", 22, 29000, 168_913), ("diving48", 50, 5800, 15_027), ("ucf101", 50, 3700, 9_537),
    ("hmdb51", 50, 1400, 3_570), ("kinetics400", 30, 48000, 205_418)])
def test_table_4_s_fine_tuning_numbers(dataset, epochs, updates, videos):
    """The rates are those of the released scripts of the analyses and of the released README."""
    for name, fps, frames, clips in ((dataset, 2, 0, 2), (f"{dataset}-results", 4, 10, 10)):
        config = parse(finetune.Config, ["--dataset", name], "", finetune.PRESETS, "dataset")
        assert (config.epochs, config.batch, config.warmup) == (epochs, 128, 0.1)
        assert (config.fps, config.frames, config.clips) == (fps, frames, clips)
        assert config.weight_decay == 0.01
        assert config.scratch_epochs == (1.5 if dataset in ("ssv2", "kinetics400") else 4)
        assert config.split == (dataset in ("ucf101", "hmdb51"))
        assert config.epochs * videos / config.batch == pytest.approx(updates, rel=0.02)


def test_a_dataset_is_one_function_and_one_entry(tmp_path, monkeypatch):
    """Jester's lists have lines of `id;label`."""
    def list_jester(root, split):
        pairs = [line.split(";") for line in read_lines(root / f"{split}.csv").values()]
        return [(root / f"{video}.webm", label) for video, label in pairs]

    monkeypatch.setitem(DATASETS, "jester", Dataset(list_jester, ("train", "val"), flip=False))
    for number in (1, 2, 3):
        (tmp_path / f"{number}.webm").touch()
    (tmp_path / "train.csv").write_text("1;Swiping Right\n2;Swiping Left\n")
    (tmp_path / "val.csv").write_text("3;Swiping Right\n")
    assert [label for _, label in list_videos("jester", tmp_path, "train")] == [1, 0]
    assert [label for _, label in list_videos("jester", tmp_path, "val")] == [1]
    assert class_names("jester", tmp_path) == ["Swiping Left", "Swiping Right"]
    assert len(data.views_for("train", 128, "jester")) == 6
    assert len(data.views_for("test", 128, "jester")) == 3
