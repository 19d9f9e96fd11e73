"""Readers of texts, their cleaning, and a tokenizer for the small models."""

import csv
import dataclasses
import html
import io
import json
import re
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fuseopt.finetune.data.source import Source, label_text, refuse

SENTENCES = Path(__file__).with_name("sentences.jsonl")
VOCABULARY = 8000

# The tokenizers of new models contain it too, so that whoever loads one need not clean.
CLEAN = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.Replace(Regex(r"<!--.*?-->|</?[A-Za-z][^<>]*>"), " "),  # tags of HTML, but not "a < b"
        normalizers.Replace(Regex(r"(?i)\b(?:https?://|www\.)\S+"), " "),
        normalizers.Replace(Regex(r"[\p{Cf}&&[^\u200c\u200d]]"), ""),  # invisible, but for the two joiners
        normalizers.Replace(Regex(r"[\s\p{Cc}]+"), " "),
        normalizers.Strip(),
    ]
)


def clean(text):
    """NFKC, without HTML tags and entities, URLs and control characters, and with single spaces."""
    return CLEAN.normalize_str(html.unescape(text))


def new_tokenizer(texts, options):
    """A byte-pair tokenizer trained on these texts: cleaned and in lower case unless options.no_clean."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    if not options.no_clean:
        tokenizer.normalizer = normalizers.Sequence([CLEAN, normalizers.Lowercase()])
    # Punctuation is cut off; a mark in front of each word tells "rain" from the end of "train".
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=2, special_tokens=["[PAD]", "[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=options.max_length,
    )


def text_row(record, where, options, problems):
    """(text, label, where) of one record, or None and an entry in `problems`."""
    text, label = (record.get(name) for name in (options.text_column, options.label_column))
    if not isinstance(text, str):
        problem = f"no text in {options.text_column!r}" + ("" if text is None else f" but {text!r:.20}")
    elif re.search("[\ud800-\udfff]", text):  # JSON can spell half a character, which nothing can encode
        problem = f"not valid Unicode in {options.text_column!r}"
    elif label_text(label) is None:
        problem = f"no label in {options.label_column!r}" + ("" if label in (None, "") else f" but {label!r:.20}")
    elif not (text := text.strip() if options.no_clean else clean(text)):
        problem = f"empty text in {options.text_column!r}"
    else:
        return text, label_text(label), where
    problems.append(f"{where}: {problem}")
    return None


def embedded_sentences(options):
    """The sentences on six topics that come with the package."""
    plain = dataclasses.replace(options, text_column="text", label_column="label")
    source = json_lines(SENTENCES, "--data sentences", plain)
    source.note = "embedded sentences on everyday topics"
    return source


def comma_separated(path, where, options):
    """A CSV file with a header, or with tabs where it ends in .tsv. Raises ValueError or OSError."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the 131072 characters of its default
    reader = csv.reader(io.StringIO(_decoded(path, where), newline=""), strict=True, delimiter=delimiter)
    header, rows, problems = None, [], []
    while True:
        line = f"line {reader.line_num + 1}"  # where the row starts; a quoted text may go over several
        try:
            fields = next(reader, None)
        except csv.Error as error:
            problems.append(f"{line}: {error}")
            continue
        if fields is None:
            break
        if not fields:
            continue
        if header is None:
            header = check_columns(fields, where, options)
        elif len(fields) != len(header):
            problems.append(f"{line}: {len(fields)} fields instead of {len(header)}")
        else:
            rows.append(text_row(dict(zip(header, fields)), line, options, problems))
    refuse(problems, where, "lines")
    return Source("text", rows, f"texts of {path.name}")


def check_columns(fields, where, options):
    """The fields, which contain the two columns of the options. Raises ValueError that names what is there."""
    for option in ("text_column", "label_column"):
        if (name := getattr(options, option)) not in fields:
            found = ", ".join(map(repr, fields)) or "none"
            raise ValueError(f"{where}: no column {name!r}, found {found}: name it with --{option}")
        if list(fields).count(name) > 1:
            raise ValueError(f"{where}: {list(fields).count(name)} columns are named {name!r}: rename the others")
    return fields


def json_lines(path, where, options):
    """A file with one JSON object a line. Raises ValueError or OSError."""
    rows, problems = [], []
    for number, line in enumerate(_decoded(path, where).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: not JSON: {error}")
            continue
        if not isinstance(record, dict):
            problems.append(f"line {number}: not an object")
            continue
        if not rows:
            check_columns(record, where, options)
        rows.append(text_row(record, f"line {number}", options, problems))
    refuse(problems, where, "lines")
    return Source("text", rows, f"texts of {path.name}")


def _decoded(path, where):
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{where}: line {line} is not UTF-8: save the file as UTF-8") from error
