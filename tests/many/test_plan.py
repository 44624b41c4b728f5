"""The command line of each checkpoint, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from foldexport import exporters
from foldexport.commands.convert import convert
from foldexport.commands.several import OF_ALL
from foldexport.errors import UsageError
from foldexport.many import plan

ONNX = (exporters.FORMATS["onnx"],)


def options(*words: str) -> list[str]:
    return plan.option_words(words, convert, OF_ALL)


def test_options_as_they_were_given_without_what_is_about_all():
    words = "a.pth --to=onnx b.pth -o out --jobs 3 --json --seed -1 --no-fold c.pth --recursive"
    assert options(*words.split()) == ["--to", "onnx", "-o", "out", "--seed", "-1", "--no-fold"]
    assert options("--to", "ts", "-oout", "--jobs=2", "--quiet", "--debug", "--", "--json", "-o") == ["--to", "ts", "-o", "out"]
    assert options("--ema", "--arch-arg", "a=1", "--arch-arg=b=2", "-") == ["--ema", "--arch-arg", "a=1", "--arch-arg", "b=2"]
    assert options("--no-ema", "a.pth") == ["--no-ema"]


def test_a_value_that_may_be_left_out():
    assert options("a.pth", "--normalize", "--to", "onnx") == ["--normalize", "--to", "onnx"]
    assert options("a.pth", "--normalize", "255", "b.pth") == ["--normalize", "255"]


def test_every_option_of_the_command_is_understood():
    for option in (each for each in convert.params if isinstance(each, click.Option)):
        for names in filter(None, (option.opts, option.secondary_opts)):
            for name in names:
                given, wanted = ([name], names[:1]) if option.is_flag else ([name, "value"], [names[0], "value"])
                assert options("a.pth", *given, "b.pth") == ([] if option.name in OF_ALL else wanted)


def words_of(*paths: str, output: str | None = None, formats=ONNX) -> list[list[str]]:
    found = plan.tasks([Path(path) for path in paths], ["--to", "onnx"], output, formats, ("inspect", "bench"))
    return [task.words for task, _ in found]


def test_a_checkpoint_that_looks_like_something_else(tmp_path):
    assert words_of("inspect", "-o", "a/bench", output=f"{tmp_path}/") == [
        ["./inspect", "--to", "onnx"], ["./-o", "--to", "onnx"], ["a/bench", "--to", "onnx"],
    ]  # fmt: skip


def refused(*paths: str, output: str | None = None, formats=ONNX) -> str:
    with pytest.raises(UsageError) as caught:
        words_of(*paths, output=output, formats=formats)
    return str(caught.value)


def test_two_that_would_write_the_same_file_are_named():
    for message in (refused("a/net.pth", "a/net.safetensors"), refused("a/net.pth", "b/net.pth.tar", output="out")):
        assert "a/net.pth and " in message and "net.onnx" in message and "rename" in message
    assert words_of("a/net.pth", "b/net.pth") and words_of("a/net.pth", "a/net2.pth", output="out")


def test_the_same_folder_under_two_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert "would both write" in refused(f"{tmp_path}/a/net.pth", f"{tmp_path}/b/net.pt")


def test_an_output_that_is_another_checkpoint():
    formats = (exporters.FORMATS["torchscript"],)
    message = refused("a/net.pth", "a/net.torchscript.pt", formats=formats)
    assert "a/net.pth would write a/net.torchscript.pt, which is another of the checkpoints" in message


@pytest.mark.parametrize("output", ["out.onnx", "build/net.onnx"])
def test_the_output_is_a_folder(output):
    assert "name a folder, such as" in refused("a.pth", "b.pth", output=output)


def test_a_file_as_output(tmp_path):
    (tmp_path / "out.txt").write_text("")
    assert "name a folder, such as" in refused("a.pth", "b.pth", output=str(tmp_path / "out.txt"))


def test_a_format_among_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--to onnx,torchscript"):
        plan.refuse_misplaced([Path("a.pth"), Path("ts")])
    (tmp_path / "ts").write_bytes(b"")
    plan.refuse_misplaced([Path("a.pth"), Path("ts")])
