"""The programs that measured run, and give the numbers that the page shows."""

import csv
import gzip
import json
import pathlib
import re
import runpy
import sys

import imageio.v2 as imageio
import pytest

import director
from conftest import HERE, RUN, run_program

sys.path.insert(0, str(HERE / "results"))
import parity


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_five_train_steps_give_the_metrics_of_the_official_program(kind):
    # Its weights, its batch, modes in place of samples: see results/parity.py.
    errors = parity.compare(kind)
    assert len(errors) == 41
    assert max(errors.values()) < 5e-5, errors


def test_goals_shows_whether_the_manager_leads_and_the_worker_reaches(
        tmp_path, capsys, monkeypatch):
    flags = [*RUN, "--task=gym_envs.grid:Grid-v0", "--processes=no", f"--logdir={tmp_path}"]
    assert director.main([*flags, "--steps=300"]) == 0
    text = run_program(monkeypatch, capsys, "results/goals.py", tmp_path)
    assert len(re.findall(r"actions: mean return \d+", text)) == 4
    cosines = [float(x) for x in re.findall(r"max-cosine (-?\d\.\d+)", text)]
    assert len(cosines) == 12 and all(-1 <= x <= 1 for x in cosines)


def test_goals_says_in_a_line_that_a_folder_holds_no_run(tmp_path, capsys, monkeypatch):
    for command in ([tmp_path], [tmp_path, "--variant", "no_such"]):
        with pytest.raises(SystemExit) as raised:
            run_program(monkeypatch, capsys, "results/goals.py", *command)
        assert raised.value.code == 2
        assert re.fullmatch(r"goals.py: .*(checkpoint.pt|no_such).*\n", capsys.readouterr().err)


def test_returns_are_drawn_from_folders_and_compressed_files(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")  # results/requirements.txt
    lines = [{"step": 100 * i, "episode/score": float(i)} for i in range(30)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "x").mkdir()
    (tmp_path / "x/metrics.jsonl").write_text(text)
    picture = tmp_path / "returns.png"
    runs = [tmp_path / "x", tmp_path / "x.jsonl.gz"]
    run_program(monkeypatch, capsys, "results/plot.py", *runs, "--out", picture)
    assert imageio.imread(picture).ndim == 3
    plot = runpy.run_path(str(HERE / "results/plot.py"))
    means = plot["mean_returns"](*plot["read_episodes"](tmp_path / "x"), 1000)
    assert means == {0: 0, 1000: 5.5, 2000: 15.5, 2900: 25}  # the last window ends with the run
    with pytest.raises(SystemExit) as raised:
        run_program(monkeypatch, capsys, "results/plot.py", tmp_path / "nothing")
    assert raised.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_every_row_of_runs_csv_has_its_metrics_and_every_metrics_file_its_row():
    with open(HERE / "results/runs.csv") as file:
        rows = list(csv.DictReader(file))
    files = {str(path.relative_to(HERE / "results")) for path in
             pathlib.Path(HERE / "results/metrics").rglob("*.jsonl.gz")}
    assert {row["file"] for row in rows} == files and len(rows) == len(files)
    for row in rows:
        with gzip.open(HERE / "results" / row["file"], "rt") as file:
            steps = [json.loads(line)["step"] for line in file]
        assert 0 <= int(row["steps"]) - steps[-1] < 13_000, row
