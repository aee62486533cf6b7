"""Jane Austen's six novels, from the R data base that carries them to chapters of unwrapped paragraphs.

The Debian package ``r-cran-janeaustenr`` holds the Project Gutenberg plain texts as R character vectors, one
string per printed line. No R is needed: the data base is a row of zlib blocks, each an R serialisation, and
of that format a character vector is the only part read here.

Source: R Internals, section 1.8 "Serialization Formats", https://cran.r-project.org/doc/manuals/R-ints.html
"""

import re
import struct
import zlib
from collections.abc import Iterator, Sequence

CHARACTER_VECTOR, CHARACTER_STRING = 16, 9  # R's STRSXP and CHARSXP

# File name -> (first line of the R vector, chapters of the printed book): what the unpacking must find.
NOVELS = {
    "emma": ("EMMA", 55),
    "mansfield_park": ("MANSFIELD PARK", 48),
    "northanger_abbey": ("NORTHANGER ABBEY", 31),
    "persuasion": ("Persuasion", 24),
    "pride_and_prejudice": ("PRIDE AND PREJUDICE", 61),
    "sense_and_sensibility": ("SENSE AND SENSIBILITY", 50),
}

HEADING = re.compile(r"\s*chapter\s+([ivxl]+|\d+)\.?\s*", re.IGNORECASE)
VOLUME = re.compile(r"\s*volume\s+[ivx]+\.?\s*", re.IGNORECASE)
TYPIST = re.compile(r"\*[* ]*|\[end volume .*|\(end of volume .*|\[at this point in .*", re.IGNORECASE)
AFTER_THE_END = re.compile(r"\s*(the end|finis|a note on the text)\.?\s*", re.IGNORECASE)


def novels(data_base: bytes) -> dict[str, list[str]]:
    """Every novel as its list of chapters, keyed and ordered as ``NOVELS``.

    Raises:
        ValueError: a novel is missing, or has another number of chapters than the printed book.
    """
    by_title = {}
    for block in zlib_blocks(data_base):
        lines = character_vector(block)
        by_title[lines[0]] = lines
    found = {}
    for name, (title, expected) in NOVELS.items():
        if title not in by_title:
            raise ValueError(
                f"novels: expected a block that begins with {title!r}, got {sorted(by_title)}; "
                "use r-cran-janeaustenr 1.0.0"
            )
        found[name] = chapters(by_title[title])
        if len(found[name]) != expected:
            raise ValueError(
                f"novels: expected {expected} chapters in {name}, got {len(found[name])}; use r-cran-janeaustenr 1.0.0"
            )
    return found


def zlib_blocks(data_base: bytes) -> Iterator[bytes]:
    """The decompressed blocks of an R lazy-load file (``.rdb``), in file order.

    Each block is its decompressed length (4 bytes, big-endian) and a zlib stream that knows its own end, so
    the index file beside the data base is not needed.

    Raises:
        ValueError: a block's length is not the stated one.
    """
    while data_base:
        (expected,) = struct.unpack_from(">I", data_base)
        stream = zlib.decompressobj()
        block = stream.decompress(data_base[4:])
        if len(block) != expected:
            raise ValueError(
                f"zlib_blocks: expected a block of {expected} bytes, got {len(block)}; "
                "give an .rdb file that R wrote with its default compression"
            )
        yield block
        data_base = stream.unused_data


def character_vector(serialised: bytes) -> list[str]:
    """The strings of one serialised R character vector (XDR format, version 3, as R >= 3.5 writes).

    Raises:
        ValueError: another format, another R type, a missing value (NA), or a vector with attributes.
    """
    if serialised[:2] != b"X\n":
        raise ValueError(
            f"character_vector: expected R's XDR serialisation (b'X\\n'), got {serialised[:2]!r}; "
            "decompress the block first"
        )
    version, _, _, encoding_length = struct.unpack_from(">4I", serialised, 2)
    if version != 3:
        raise ValueError(f"character_vector: expected version 3, got {version}; save the vector with R >= 3.5")
    at = 18 + encoding_length  # the native encoding's name: every string below states its own
    flags, count = struct.unpack_from(">2I", serialised, at)
    at += 8
    if flags != CHARACTER_VECTOR:  # type in the low byte; any bit above it is an attribute, class or tag
        raise ValueError(
            f"character_vector: expected a plain character vector (flags {CHARACTER_VECTOR}), got flags "
            f"{flags}; other R objects are not read here"
        )
    strings = []
    for index in range(count):
        flags, length = struct.unpack_from(">Ii", serialised, at)
        at += 8
        if flags & 0xFF != CHARACTER_STRING or length < 0:
            raise ValueError(
                f"character_vector: expected a string at position {index}, got type {flags & 0xFF} "
                f"of length {length}; missing values are not read here"
            )
        strings.append(serialised[at : at + length].decode("utf-8"))
        at += length
    return strings


def chapters(lines: Sequence[str]) -> list[str]:
    """The chapters of a novel in printed lines, each a text of one paragraph per line, blank lines between.

    Title page, headings, volume marks and what follows the end are left out: only Austen's running prose is
    wanted, and a heading would be a line that all novels share.
    """
    printed: list[list[str]] = []
    for line in lines:
        if AFTER_THE_END.fullmatch(line):
            break
        if HEADING.fullmatch(line):
            printed.append([])
        elif printed and not VOLUME.fullmatch(line):
            printed[-1].append(line)
    return [unwrap(chapter) for chapter in printed]


def unwrap(lines: Sequence[str]) -> str:
    """Printed lines as one line per paragraph, a blank line between paragraphs.

    Left out with the line ends is what tells the typist from the author: two of the novels were typed with
    two spaces after a full stop (here: one), and rows of stars and notes of the edition stand between
    paragraphs.
    """
    paragraphs = "\n".join(line.strip() for line in lines).split("\n\n")
    joined = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return "\n\n".join(paragraph for paragraph in joined if paragraph and not TYPIST.fullmatch(paragraph))
