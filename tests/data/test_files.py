"""Finding files: names of studies, every container, and what is refused before it is read."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zipfile
from pathlib import Path

import pytest
from support.rows import ROWS, in_parquet, json_lines, read_all, write, zipped

from psykern.core.errors import DataError
from psykern.core.types import Transcript
from psykern.data.dataset import DataFile, Dataset
from psykern.data.files import find_files, hash_file
from psykern.data.read import read


def as_tuple(transcript: Transcript) -> tuple[object, ...]:
    names = ("study", "experiment", "participant", "text", "options")
    return (*(getattr(transcript, name) for name in names), transcript.responses_char.tolist(), transcript.source.line)


class TestFindData:
    @pytest.mark.parametrize(
        ("path", "study"),
        [
            ("frey2017mpl.jsonl.gz", "frey2017mpl"),
            ("frey2017mpl.zip", "frey2017mpl"),
            ("exp1a.parquet", "exp1a"),
            ("dezfouli2019/prompts.jsonl", "dezfouli2019"),
            ("dezfouli2019/prompts.jsonl.gz", "dezfouli2019"),
            ("hartley2024twoarmedbandit/prompts.zip", "hartley2024twoarmedbandit"),
            ("burton2022optimism/prompts_jsonl.zip", "burton2022optimism"),
            ("my_study/data/train-00000-of-00001.parquet", "my_study"),
            ("my_study/default/train/0000.parquet", "my_study"),
            ("my_study/train-00003-of-00017-0f3a5c7e9b1d2f4a.parquet", "my_study"),
            ("my_study/default/partial-train/0000.parquet", "my_study"),
            ("my_study/train.00000-of-00010.jsonl", "my_study"),
            ("my_study/chunk_0001.jsonl", "my_study"),
            ("my_study/data/chunk-000/file-000.parquet", "my_study"),
            ("my_study/data/000_00000.parquet", "my_study"),
            ("my_study/0000_part_00.parquet", "my_study"),
            ("my_study/part.0.parquet", "my_study"),
            ("my_study/dev.jsonl", "my_study"),
            ("my_study/part-00000-4f6a7f3e-7c4b-4a57-9a4e-0c7a55b0e9f1-c000.snappy.parquet", "my_study"),
            ("my_study/part-00001-4f6a7f3e-7c4b-4a57-9a4e-0c7a55b0e9f1.c000.snappy.parquet", "my_study"),
            ("my_study/5d41402abc4b2a76b9719d911017c592-0.parquet", "my_study"),
            ("table/study=foo/part-0.parquet", "foo"),
            ("table/study=a%20b/year=2024/0.parquet", "a b"),
            ("table/study=__HIVE_DEFAULT_PARTITION__/0.parquet", "table"),
            ("table/year=2024/month=5/data_0.parquet", "table"),
            ("n=20.jsonl", "n=20"),
            (
                "hub/datasets--owner--my-study/snapshots/6f2d962924a8a32abfee0e42dc3ce3f963f21fd5/data/0.parquet",
                "my-study",
            ),
            ("hub/datasets--squad/snapshots/6f2d962924a8a32abfee0e42dc3ce3f963f21fd5/train.parquet", "squad"),
            ("hub/datasets--o--n/snapshots/6f2d962924a8a32abfee0e42dc3ce3f963f21fd5/exp2/train.parquet", "exp2"),
            ("my_study/6f2d962924a8a32abfee0e42dc3ce3f963f21fd5/train.parquet", "my_study"),
            ("part2_of_my_study.jsonl", "part2_of_my_study"),
            ("testing.jsonl", "testing"),
            ("cafe.jsonl", "cafe"),
        ],
    )
    def test_study_is_the_first_name_that_says_something(self, tmp_path: Path, path: str, study: str) -> None:
        suffix = Path(path).suffix
        content = {".zip": zipped({"prompts.jsonl": b""}), ".parquet": in_parquet(ROWS)}.get(suffix, b"")
        file = write(tmp_path / "collection" / path, content)
        assert find_files([file]) == [(file, study)]
        assert find_files([str(tmp_path / "collection")]) == [(file, study)]

    def test_a_folder_is_searched_in_order_and_other_files_are_ignored(self, tmp_path: Path) -> None:
        for name in ("c.jsonl", "b/prompts.jsonl", "a.jsonl", "README.md", "b/raw.csv", ".git/x.jsonl", "b/.y.jsonl"):
            write(tmp_path / name)
        found = find_files([tmp_path])
        assert [file.study for file in found] == ["a", "b", "c"]
        assert [file.path for file in found] == [
            tmp_path / "a.jsonl",
            tmp_path / "b/prompts.jsonl",
            tmp_path / "c.jsonl",
        ]

    def test_a_file_reached_in_several_ways_is_read_once(self, tmp_path: Path) -> None:
        file = write(tmp_path / "b" / "b.jsonl")
        (tmp_path / "a_link").symlink_to(tmp_path / "b")
        (tmp_path / "b" / "loop").symlink_to(tmp_path)
        assert len(find_files([tmp_path, file, f"{tmp_path}/b/../b/b.jsonl"])) == 1

    def test_a_relative_folder_names_its_study(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "my_study" / "prompts.jsonl")
        monkeypatch.chdir(tmp_path / "my_study")
        assert find_files(["."]) == [(Path("prompts.jsonl"), "my_study")]

    def test_missing_path(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file or folder$"):
            find_files([tmp_path / "nowhere.jsonl"])

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"rows\.csv: expected a name that ends in \.jsonl\.gz, .*, got rows\.csv"):
            find_files([write(tmp_path / "rows.csv")])

    def test_folder_with_nothing_in_it(self, tmp_path: Path) -> None:
        write(tmp_path / "README.md")
        with pytest.raises(DataError, match=r"expected files that end in .*\.parquet, found none"):
            find_files([tmp_path])

    @pytest.mark.parametrize("name", ["b.jsonl.bz2", "b.JSONL.zst", "b.parquet.gz", "b.ndjson", "b.ndjson.gz"])
    def test_rows_that_are_not_read_are_not_passed_over(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / "a.jsonl")
        write(tmp_path / name)
        with pytest.raises(
            DataError, match=rf"{re.escape(name)}: expected a name that ends in .*; unpack, rename or move"
        ):
            find_files([tmp_path])

    @pytest.mark.parametrize("name", ["b.jsonl.md5", "b.jsonl.lock", "b.json", "b.csv.bz2", ".b.jsonl.bz2"])
    def test_files_of_other_kinds_are(self, tmp_path: Path, name: str) -> None:
        file = write(tmp_path / "a.jsonl")
        write(tmp_path / name)
        assert find_files([tmp_path]) == [(file, "a")]

    @pytest.mark.parametrize("data", [[], [""], ["a.jsonl", ""]], ids=["none", "empty", "one empty"])
    def test_nothing_is_not_the_folder_at_hand(
        self, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`psykern score MODEL "$DATA"` where the variable is not set."""
        write(tmp_path / "a.jsonl")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match="data: expected paths or ids of the hub, got nothing, or an empty string"):
            find_files(data)

    def test_packed_copy_beside_the_file(self, tmp_path: Path) -> None:
        write(tmp_path / "dezfouli2019" / "prompts.jsonl")
        write(tmp_path / "dezfouli2019" / "prompts.jsonl.zip", zipped({"prompts.jsonl": b""}))
        with pytest.raises(DataError, match=r"prompts\.jsonl\.zip: stands beside prompts\.jsonl, expected one file"):
            find_files([tmp_path])

    def test_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.jsonl")
        for data in (tmp_path, tmp_path / "a.jsonl"):
            with pytest.raises(DataError, match=r"a\.jsonl: expected a file, as data are read more than once"):
                find_files([data])

    def test_git_lfs_pointer(self, tmp_path: Path) -> None:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:899428fe\nsize 446239\n"
        with pytest.raises(DataError, match=r"zika2023.prompts\.zip: expected data, got a Git LFS pointer"):
            find_files([write(tmp_path / "zika2023" / "prompts.zip", pointer)])


class TestHub:
    def test_dataset_id_is_downloaded_and_names_the_study(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        snapshot = tmp_path / "datasets--owner--Psych-Set" / "snapshots" / "6f2d962924a8a32abfee0e42dc3ce3f963f21fd5"
        file = write(snapshot / "data" / "train-00000-of-00001.parquet", in_parquet(ROWS))
        asked = []

        def snapshot_download(dataset: str, *, repo_type: str, revision: str | None, allow_patterns: str) -> str:
            asked.append((dataset, repo_type, revision, allow_patterns))
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        assert find_files(["owner/Psych-Set"]) == [(file, "Psych-Set")]
        for revision in ("v1.0", "refs/convert/parquet", "6f2d962924a8a32abfee0e42dc3ce3f963f21fd5"):
            assert find_files([f"owner/Psych-Set@{revision}"]) == [(file, "Psych-Set")]
            assert asked.pop() == ("owner/Psych-Set", "dataset", revision, "*.parquet")
        assert asked == [("owner/Psych-Set", "dataset", None, "*.parquet")]
        for place in (snapshot, snapshot / "data", snapshot.parents[1], tmp_path, file):  # downloaded before
            assert find_files([place]) == [(file, "Psych-Set")]

    def test_dataset_without_parquet(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its rows are not downloaded, so that none are found."""
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
        with pytest.raises(
            DataError, match=r"^owner/name: of the hub only \*\.parquet is taken: .*, found none; download"
        ):
            find_files(["owner/name"])

    def test_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(DataError, match=r"^owner/not-cached: .*download it first \(hf download .*or give a folder"):
            find_files(["owner/not-cached"])
        with pytest.raises(
            DataError, match=r"^owner/not-cached@v2: .*hf download .* owner/not-cached --revision v2\) or"
        ):
            find_files(["owner/not-cached@v2"])

    def test_local_folder_comes_before_the_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def snapshot_download(*_: object, **__: object) -> str:
            raise AssertionError("the hub was asked")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        write(tmp_path / "owner" / "name" / "prompts.jsonl")
        monkeypatch.chdir(tmp_path)
        assert [file.study for file in find_files(["owner/name"])] == ["name"]
        for name in ("owner/other.jsonl", "owner/name@", "owner/name/other", "owner@v1"):  # mistyped, not dataset ids
            with pytest.raises(DataError, match=r"no such file or folder$"):
                find_files([name])


class TestContainers:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            pytest.param("s.jsonl", json_lines(ROWS), id="plain"),
            pytest.param("s.jsonl", b"\xef\xbb\xbf" + json_lines(ROWS), id="byte order mark"),
            pytest.param(
                "s.jsonl",
                b"\xef\xbb\xbf" + json_lines(ROWS[:1]) + b"\xef\xbb\xbf" * 2 + json_lines(ROWS[1:]),
                id="files with byte order marks, put together",
            ),
            pytest.param("s.jsonl", json_lines(ROWS).replace(b"\n", b"\r\n").rstrip(), id="windows line breaks"),
            pytest.param("s.jsonl.gz", gzip.compress(json_lines(ROWS)), id="gzip"),
            pytest.param("s.jsonl.zip", zipped({"prompts.jsonl": json_lines(ROWS)}), id="zip"),
            pytest.param(
                "s.zip",
                zipped({"a/rows.jsonl": json_lines(ROWS), "__MACOSX/a/._rows.jsonl": b"?"}, zipfile.ZIP_STORED),
                id="zip stored",
            ),
            pytest.param(
                "s.jsonl.zip",
                zipped({"raw.jsonl": b"?", "d/prompts.jsonl": json_lines(ROWS), "__MACOSX/d/._prompts.jsonl": b"?"}),
                id="zip with more in it",
            ),
            pytest.param(
                "s.zip", zipped({"a/r.jsonl": json_lines(ROWS), "a/._r.jsonl": b"?"}), id="zip by other tools"
            ),
            pytest.param("s.parquet", in_parquet(ROWS), id="parquet"),
            pytest.param("s.parquet", in_parquet(ROWS, row_group_size=1, use_dictionary=["text"]), id="parquet groups"),
        ],
    )
    def test_every_container_gives_the_same(self, tmp_path: Path, name: str, content: bytes) -> None:
        transcripts, rejected = read_all(write(tmp_path / name, content))
        assert rejected == []
        assert [as_tuple(transcript) for transcript in transcripts] == [
            ("s", "exp1", "7", ROWS[0]["text"], (("A", "B"), ("A", "B")), [[12, 13], [23, 24]], 1),
            ("s", "exp1", "7", ROWS[1]["text"], None, [[9, 9], [19, 22]], 2),
            ("s", "exp2", "8", ROWS[2]["text"], None, [], 3),
        ]

    def test_source_names_the_member(self, tmp_path: Path) -> None:
        file = write(tmp_path / "s.zip", zipped({"d/prompts.jsonl": json_lines(ROWS)}))
        assert read_all(file)[0][0].source.file == f"{file}!d/prompts.jsonl"

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            pytest.param(
                {"a.txt": b"", "b.csv": b""}, r"expected one member .*; it holds a\.txt, b\.csv", id="no rows"
            ),
            pytest.param({}, "expected one member .*; it holds nothing", id="empty"),
            pytest.param(
                {"x/prompts.jsonl": b"", "y/prompts.jsonl": b""},
                r"expected one member .*; it holds x/prompts\.jsonl, y/prompts\.jsonl",
                id="two",
            ),
        ],
    )
    def test_zip_without_one_member_of_rows(self, tmp_path: Path, members: dict[str, bytes], message: str) -> None:
        file = write(tmp_path / "s.zip", zipped(members))
        with pytest.raises(DataError, match=message):
            find_files([file])
        with pytest.raises(DataError, match=message):
            list(read(Dataset((DataFile(file, "s", "", 0),))))

    def test_encrypted_zip(self, tmp_path: Path) -> None:
        content = bytearray(zipped({"prompts.jsonl": json_lines(ROWS)}))
        content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the archive's directory
        with pytest.raises(DataError, match=r"member prompts\.jsonl is encrypted"):
            find_files([write(tmp_path / "s.zip", bytes(content))])

    def test_zip_packed_by_an_unknown_method(self, tmp_path: Path) -> None:
        file = write(tmp_path / "s.zip", zipped({"prompts.jsonl": json_lines(ROWS)}, zipfile.ZIP_LZMA))
        with pytest.raises(DataError, match="expected packing by deflate or none, got method 14"):
            find_files([file])

    def test_file_that_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read: No such file"):
            list(read(Dataset((DataFile(tmp_path / "gone.jsonl", "s", "", 0),))))

    def test_hash(self, tmp_path: Path) -> None:
        content = bytes(range(256)) * 10_000  # more than one block
        assert hash_file(write(tmp_path / "x", content)) == "sha256:" + hashlib.sha256(content).hexdigest()
        with pytest.raises(DataError, match="y: cannot be read"):
            hash_file(tmp_path / "y")
