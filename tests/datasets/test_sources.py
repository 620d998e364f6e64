"""What a user gives: every layout that is read, and what is said of what is not."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rats_video.datasets.prompts.files import read_prompts
from rats_video.datasets.shapes.render import split_combinations
from rats_video.datasets.video.clips import read_source
from rats_video.datasets.video.records import split_of
from rats_video.datasets.video.settings import PrepareConfig
from rats_video.datasets.video.sources import SourceList, find_sources
from rats_video.errors import UserError


def config(**others: Any) -> PrepareConfig:
    buckets = [{"num_frames": 5, "height": 32, "width": 32}]
    return PrepareConfig.model_validate({"model": "none", "buckets": buckets, **others})


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """A folder of files with these contents."""

    def write(files: dict[str, str | bytes]) -> Path:
        for name, content in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / "data"

    return write


def pairs(found: SourceList) -> list[tuple[str, str | None]]:
    return [(each.name, each.caption) for each in found.videos]


def reasons(found: SourceList) -> list[tuple[str, str]]:
    return [(each.name, each.reason) for each in found.skipped]


def find(path: Path, **others: Any) -> SourceList:
    return find_sources(str(path), config(**others))


def archive(members: dict[str, str], **form: Any) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", **form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            tar.addfile(info, io.BytesIO(content.encode()))
    return data.getvalue()


def test_folder_with_captions_beside_videos(make: Callable[..., Path]) -> None:
    folder = make({
        "b.mp4": "", "b.txt": "\ufeff two\n words ", "a/C.MKV": "", "a/C.caption": "three", "a/d.webm": "",
        ".hidden.mp4": "", ".git/e.mp4": "", "f.mp4.part": "", "notes.md": "", "g.mp4": "", "g.txt": b"\xff",
        "h.mp4": "", "h.txt": "\x1b",
    })  # fmt: skip
    found = find(folder)
    assert pairs(found) == [("a/C.MKV", "three"), ("b.mp4", "two words")]
    assert reasons(found) == [
        ("a/d.webm", "no caption"), ("g.mp4", "caption is not UTF-8 text"), ("h.mp4", "caption is no plain text"),
    ]  # fmt: skip
    assert pairs(find(folder, missing_caption="empty"))[1] == ("a/d.webm", None)


def test_caption_names_of_both_customs(make: Callable[..., Path]) -> None:
    folder = make({
        "UPPER.MP4": "", "UPPER.TXT": "one", "double.mp4": "", "double.mp4.txt": "two",
        "x.Mov": "", "x.Mov.Caption": "three",
        "both.mp4": "", "both.txt": "four", "both.mp4.txt": "not this", "empty.mp4": "", "empty.txt": " \n",
        "none.mp4": "", "captions.json": "[]",
    })  # fmt: skip
    found = find(folder)
    assert pairs(found) == [("UPPER.MP4", "one"), ("both.mp4", "four"), ("double.mp4", "two"), ("x.Mov", "three")]
    names = "none.txt, none.mp4.txt, none.caption, none.mp4.caption"
    assert [(each.name, each.reason, each.detail) for each in found.skipped] == [
        ("empty.mp4", "no caption", "empty.txt is empty"),
        (
            "none.mp4", "no caption",
            f"looked for {names}; captions.json may be a table: give it as SOURCE, or name it metadata.json",
        ),
    ]  # fmt: skip
    assert pairs(find(folder / "UPPER.MP4")) == [("UPPER.MP4", "one")]


def test_images_and_posters(make: Callable[..., Path]) -> None:
    tar = archive({"k.png": "image", "k.txt": "two"})
    folder = make({
        "a.JPG": "", "a.txt": "one", "b.mp4": "", "b.txt": "three", "b.jpg": "", "c.tar": tar, "d.webp": "",
        "t.csv": "image,text\na.JPG,four\nb.mp4,five\n",
    })  # fmt: skip
    found = find(folder)
    assert [(each.name, each.caption, each.kind) for each in found.videos] == [
        ("a.JPG", "one", "image"), ("b.mp4", "three", "video"), ("c.tar/k.png", "two", "image"),
    ]  # fmt: skip
    assert reasons(found) == [("b.jpg", "an image of the name of a video beside it"), ("d.webp", "no caption")]
    table = find(folder / "t.csv")
    assert [(each.caption, each.kind) for each in table.videos] == [("four", "image"), ("five", "video")]


def test_reason_names_the_columns(make: Callable[..., Path]) -> None:
    folder = make({"a.mp4": "", "t.json": '[{"path": "a.mp4", "note": "x"}]', "u.csv": "path,text\na.mp4,\na.mp4,b"})
    [row] = find(folder / "t.json").skipped
    assert (row.reason, row.detail) == (
        "no caption", "no column caption (caption, text, prompt, cap, prompt_en) among its columns: path, note",
    )  # fmt: skip
    assert [each.detail for each in find(folder / "u.csv").skipped] == ["column text is empty"]


def test_links(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make({"a.mp4": "", "a.txt": "one"})
    (tmp_path / "secret.mp4").touch()
    (folder / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (folder / "loop").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.mp4")
    found = find(folder)
    assert pairs(found) == [("a.mp4", "one")]
    assert reasons(found) == [(name, "a link that leads out of the folder") for name in ("out.mp4", "up")]


def test_snapshot_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    for name in ("a.mp4", "a.txt"):
        for folder in (blobs, snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (blobs / f"hash-of-{name}").write_text("one")
        (snapshot / name).symlink_to(blobs / f"hash-of-{name}")
    assert pairs(find(snapshot)) == [("a.mp4", "one")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", 'file_name,text\nb.mp4,"two, three"\nv/a.mp4,one\n'),
        ("metadata.tsv", "video\tprompt\nb.mp4\ttwo, three\nv/a.mp4\tone\n"),
        ("metadata.jsonl", '{"media_path": "b.mp4", "text": "two, three"}\n\n{"media_path": "v/a.mp4", "text": "one"}'),
        ("metadata.NDJSON", '{"path": "b.mp4", "cap": ["two, three"]}\n{"path": "v/a.mp4", "cap": ["one"]}'),
        ("metadata.json", '[{"file_path": "b.mp4", "text": "two, three"}, {"file_path": "v/a.mp4", "text": "one"}]'),
    ],
)  # fmt: skip
def test_tables(make: Callable[..., Path], name: str, text: str) -> None:
    folder = make({"b.mp4": "", "v/a.mp4": "", "v/c.mp4": "", "b.txt": "not this", name: text})
    found = find(folder)
    assert pairs(found) == [("b.mp4", "two, three"), ("v/a.mp4", "one")]
    assert reasons(found) == [("v/c.mp4", "not in the folder's table")]
    assert pairs(find(folder / name)) == pairs(found)


def test_pair_of_lists(make: Callable[..., Path]) -> None:
    folder = make({"v/a.mp4": "", "b.mp4": "", "videos.txt": "v/a.mp4\nb.mp4\n", "prompts.txt": "one\ntwo\n"})
    assert pairs(find(folder)) == [("b.mp4", "two"), ("v/a.mp4", "one")]
    (folder / "prompts.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"prompts\.txt: 1 captions for 2 videos in videos\.txt"):
        find(folder)


def test_spans_of_one_file_and_rows_that_are_no_use(make: Callable[..., Path]) -> None:
    rows = [
        "a.mp4,x,2,3.5", "a.mp4,y,0,1", "a.mp4,z,0:01:02.5,", "a.mp4,again,2,3.5", "a.mp4,w,3,2", "a.mp4,w,nan,",
        "a.mp4,w,soon,", "b.mp4,w,,", ",w,,", "a.mp4,one, two,0,1", "sub,w,,",
    ]  # fmt: skip
    folder = make({"a.mp4": "", "sub/.keep": "", "t.csv": "file_name,caption,start,end\n" + "\n".join(rows)})
    found = find(folder / "t.csv")
    assert [(each.caption, each.start, each.end) for each in found.videos] == [
        ("y", 0.0, 1.0), ("x", 2.0, 3.5), ("z", 62.5, None),
    ]  # fmt: skip
    assert sorted(reasons(found)) == [
        ("a.mp4", "duplicate row"), ("a.mp4", "more fields than columns"),
        *[("a.mp4", "start and end are no span of seconds")] * 3,
        ("b.mp4", "missing file"), ("row 9", "names no file"), ("sub", "no plain file"),
    ]  # fmt: skip


def test_archives(make: Callable[..., Path]) -> None:
    long = "d/" + "n" * 150
    members = {"x/1.mp4": "first", "x/1.txt": "one", "x/2.mp4": "second", "x/2.json": '{"caption": "two"}', "3.mp4": "",
               f"{long}.mp4": "third", f"{long}.txt": "long", "../4.mp4": "up", "../4.txt": "four"}  # fmt: skip
    whole = archive(members)
    folder = make({
        "a.tar": whole, "b/c.tar": archive({"1.mp4": "again", "1.txt": "one"}, format=tarfile.PAX_FORMAT),
        "cut.tar": whole[:1200], "text.tar": "text", "bad.tar": whole[:2048] + b"\xff" * 512 + whole[2560:],
    })  # fmt: skip
    found = find(folder)
    assert pairs(found) == [
        ("a.tar/../4.mp4", "four"), (f"a.tar/{long}.mp4", "long"), ("a.tar/x/1.mp4", "one"), ("a.tar/x/2.mp4", "two"),
        ("b/c.tar/1.mp4", "one"),
    ]  # fmt: skip
    assert reasons(found) == [
        ("a.tar/3.mp4", "no caption"), *((name, "damaged archive") for name in ("bad.tar", "cut.tar", "text.tar"))
    ]  # fmt: skip
    for each, content in zip(found.videos, ("up", "third", "first", "second", "again"), strict=True):
        assert each.member is not None
        offset, size = each.member
        assert each.path.read_bytes()[offset : offset + size] == content.encode()
    assert [each.caption for each in find(folder / "a.tar").videos] == ["four", "long", "one", "two"]


def test_prompts_alone(make: Callable[..., Path]) -> None:
    table = "Prompt;seed\na cat;7\na dog;8"
    folder = make(
        {"p.txt": "a cat\n\na dog\n", "p.ndjson": '{"cap": ["a cat"]}\n"a dog"\n', "P.CSV": table, "p": "a cat\na dog"}
    )
    for name in ("p.txt", "p.ndjson", "P.CSV", "p"):
        found = find(folder / name)
        assert read_prompts(folder / name) == ("a cat", "a dog")
        assert [(each.kind, each.caption) for each in found.videos] == [("prompt", "a cat"), ("prompt", "a dog")]
        read = read_source(found.videos[0], config())
        assert (read.clips, read.skipped, len(read.digest)) == ((), (), 64)


def test_one_video(make: Callable[..., Path]) -> None:
    assert pairs(find(make({"a.mp4": "", "a.txt": "one"}) / "a.mp4")) == [("a.mp4", "one")]


def test_shapes_are_a_function_of_seed_and_index() -> None:
    few, many = (find_sources("shapes", config(num_shapes=count, heldout=0.3)).videos for count in (4, 40))
    assert many[:4] == few
    cfg = config(num_shapes=40, heldout=0.3)
    read = read_source(many[3], cfg)
    again = read_source(few[3], cfg)
    assert (read.clips[0].frames == again.clips[0].frames).all()
    assert read.clips[0].frames.shape == (5, 3, 32, 32)
    assert read.clips[0].frames.float().std() > 5
    splits = dict(zip(("train", "heldout"), ({a.prompt for a in each} for each in split_combinations()), strict=True))
    drawn = [(split_of(read_source(each, cfg).digest, cfg), each.caption) for each in many]
    assert all(caption in splits[split] for split, caption in drawn)
    assert {split for split, _ in drawn} == {"train", "heldout"}
    with pytest.raises(UserError, match=r"buckets\.0\.num_frames: 21 are too many"):
        find_sources("shapes", config(buckets=[{"num_frames": 21, "height": 32, "width": 32}]))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("t.jsonl", '{"file_name": "a.mp4"}\n{oops\n', "line 2: is no JSON: "),
        ("t.jsonl", "[1]\n", "line 1: is no JSON object"),
        ("t.json", '{"a": 1}', "holds no list of objects"),
        ("t.csv", "a,b\n1,2\n", "no column file (file_name, video, "),
        ("t.csv", 'file_name,text\na.mp4,"open\n', "line 2: "),
        ("t.csv", b"file_name,text\n\xff,\n", "it is not UTF-8 text"),
        ("t.txt", "v/a.mp4\nv/b.mp4\n", "lists videos, not prompts"),
        ("t.parquet", "x", "is nothing that can be prepared"),
        ("sub/t.md", "", "no video or image in it (looked for videos (*.mp4"),
    ],
)
def test_bad_source_is_one_line(make: Callable[..., Path], name: str, content: str | bytes, line: str) -> None:
    folder = make({name: content})
    with pytest.raises(UserError) as caught:
        find(folder if name.startswith("sub") else folder / name)
    assert line in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_two_tables_and_nothing_at_all(make: Callable[..., Path]) -> None:
    folder = make({"metadata.csv": "file_name\n", "metadata.jsonl": ""})
    with pytest.raises(UserError, match=r"has metadata\.csv and metadata\.jsonl"):
        find(folder)
    with pytest.raises(UserError, match="No such file or directory"):
        find(folder / "nothing")
    with pytest.raises(UserError, match="no plain file"):
        find_sources("/dev/zero", config())


def test_name_that_is_not_utf8_is_told(make: Callable[..., Path]) -> None:
    folder = make({"a.mp4": "", "a.txt": "one"})
    (folder / os.fsdecode(b"\xff.mp4")).touch()
    assert reasons(find(folder)) == [("\\udcff.mp4", "file name is not UTF-8")]
