import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_shapes_verify_and_a_tokenizer(tmp_path: Path) -> None:
    out = tmp_path / "shapes"
    made = run("prepare_data.py", "shapes", "--out", out, "--train", 100, "--validation", 10, "--image_size", 64)
    assert made.returncode == 0, made.stderr
    assert f"{out}: 100 train, 10 validation" in made.stdout
    assert "vocabulary       400" in made.stdout

    verified = run("prepare_data.py", "verify", out)
    assert verified.stdout == f"{out}: 2 shards are whole (100 train, 10 validation)\n"

    again = run("prepare_data.py", "shapes", "--out", out)
    assert (again.returncode, again.stderr) == (1, f"error: {out} exists: remove it or choose another --out\n")

    trained = run("train_tokenizer.py", "--data", out, "--vocab_size", 400, "--out", tmp_path / "new.model")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "new.model").read_bytes() == (out / "tokenizer.model").read_bytes()

    shard = out / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    broken = run("prepare_data.py", "verify", out)
    assert broken.returncode == 1
    assert broken.stderr.startswith(f"error: shard {shard} has ")


def test_tokenizer_from_text(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one line\n\nand another line\n" * 20)
    trained = run("train_tokenizer.py", "--text", tmp_path / "lines.txt", "--vocab_size", 290, "--out", tmp_path / "t.model")
    assert "290 pieces; 40 texts" in trained.stdout, trained.stderr
    missing = run("train_tokenizer.py", "--text", tmp_path / "none.txt", "--out", tmp_path / "u.model")
    assert (missing.returncode, missing.stderr) == (1, f"error: no text file at {tmp_path / 'none.txt'}\n")
    assert not (tmp_path / "u.model").exists()
