"""Who is one person: rows of one study, experiment and participant.

Files that were numbered by themselves can call two people alike. An id that a second file of the experiment has is
counted, and taken as ``same_participants`` says: as the same person (merge), as another one, who is then called
``<id>@<tag of the later file>`` (separate), or not at all (error). Files are read in a fixed order, so every process
that reads them finds the same. A person without an id is called ``<tag of the file>:<line>``, which depends on the
file's content and not on its place or name. A row that repeats one of the same person, text and all, is counted too,
and so are those of a copied file, whose name can make it another study.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from psykern.core.errors import DataError
from psykern.core.settings import SameParticipants
from psykern.core.types import Transcript
from psykern.data.dataset import Dataset


class People:
    """The people seen so far. About 160 bytes of memory for each row."""

    def __init__(self, dataset: Dataset, same: SameParticipants) -> None:
        self._paths = dataset.paths
        self._tags = [file.tag or str(number) for number, file in enumerate(dataset.files, start=1)]
        hashes = [file.hash for file in dataset.files]
        self._is_copy = [digest != "" and digest in hashes[:number] for number, digest in enumerate(hashes)]
        self._same = same
        self._file: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)  # by study, experiment and participant
        self._shared: set[tuple[str, str, str]] = set()  # who is in more than one
        self._rows: set[int] = set()  # hashes of people with their texts

    def name(self, file: int, line: int) -> str:
        """Of a person without an id, on ``line`` of the data set's file number ``file``."""
        return f"{self._tags[file]}:{line}"

    def place(self, transcript: Transcript, file: int) -> Transcript:
        """A row of the file number ``file``, under the name of its person, with what is to be counted of it. Raises
        DataError where the setting is "error" and the person is in an earlier file."""
        if self._is_known(transcript) or self._is_copy[file]:
            transcript = replace(transcript, repeats=True)
        if len(self._paths) == 1:
            return transcript
        known = self._file[transcript.study, transcript.experiment]
        name = transcript.participant
        first = known.setdefault(name, file)
        if first == file:
            return transcript
        if self._same == "error":
            raise DataError(
                f"{transcript.source}: participant {name!r} of study "
                f"{transcript.study}, experiment {transcript.experiment!r}, is also in {self._paths[first]}; expected "
                "a participant in one file: choose to merge them or to take them as separate people"
            )
        person = (transcript.study, transcript.experiment, name)
        joins = person not in self._shared
        self._shared.add(person)
        if self._same == "separate":
            while known.setdefault(name, file) != file:  # a third copy of a file has the second one's tag
                name = f"{name}@{self._tags[file]}"
        return replace(transcript, participant=name, joins_files=joins)

    def _is_known(self, transcript: Transcript) -> bool:
        row = hash((transcript.study, transcript.experiment, transcript.participant, transcript.text))
        known = row in self._rows
        self._rows.add(row)
        return known
