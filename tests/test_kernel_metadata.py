"""Kernel metadata: made from arguments, and every problem of it said at once."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest

from kd_kit import kernel_metadata as module
from kd_kit.kernel_metadata import (
    METADATA,
    SOURCE_LIMIT,
    kernel_metadata,
    problems,
    read_metadata,
    sent_text,
    slugified,
    validate,
)

KERNELS = Path(__file__).parent.parent / "kaggle"
GOOD = kernel_metadata("ada", "distill-t4x2", enable_internet=True, machine_shape="NvidiaTeslaT4", title="Distill T4x2")


def test_the_examples_run():
    assert doctest.testmod(module).attempted and not doctest.testmod(module).failed


def test_metadata_from_arguments():
    made = kernel_metadata(
        "ada",
        "distill-t4x2",
        enable_internet=False,
        machine_shape="NvidiaTeslaT4",
        dataset_sources=["OWNER/kd-kit-embedded-pair", "OWNERS/other"],
        kernel_sources=["OWNER/distill-t4x2"],
    )
    assert made["id"] == "ada/distill-t4x2" and made["code_file"] == "distill-t4x2.ipynb"
    assert (made["enable_gpu"], made["enable_tpu"], made["enable_internet"]) == (True, False, False)
    assert made["dataset_sources"] == ["ada/kd-kit-embedded-pair", "OWNERS/other"]
    assert made["kernel_sources"] == ["ada/distill-t4x2"]
    assert validate(made) == []
    on_cpu = kernel_metadata("ada", "quickstart-cpu", enable_internet=False)
    assert "machine_shape" not in on_cpu and on_cpu["enable_gpu"] is False


@pytest.mark.parametrize("name", sorted(path.name for path in KERNELS.iterdir() if path.is_dir()))
def test_the_kernels_of_the_project_lack_an_owner_and_nothing_else(name):
    metadata = json.loads((KERNELS / name / METADATA).read_text())
    assert [p for p in problems(metadata) if "placeholder" not in p] == []
    assert len(problems(metadata)) == 1
    with pytest.raises(ValueError, match="id: expected a Kaggle account, got the placeholder 'OWNER'; build"):
        validate(metadata)
    assert metadata["id"] == f"OWNER/{name}" and metadata["code_file"] == f"{name}.ipynb"
    assert not (KERNELS / name / metadata["code_file"]).exists(), "the client would push the folder as it is"
    assert not (KERNELS / name / "__init__.py").exists(), "Python would take the folder for Kaggle's client"
    readme = (KERNELS / name / "README.md").read_text()
    assert readme.count("\n") == 2 and f"KERNEL={name}" in readme


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("id", "ada/abcd", "id: expected a slug of at least 5 characters, got 'abcd'"),
        ("id", "ada/distill-t4x2/3", "id: expected 'owner/slug', got 'ada/distill-t4x2/3'"),
        ("id", "ada/Distill_T4x2", "id: expected a slug of a-z, 0-9 and single hyphens"),
        ("id", "OWNER/distill-t4x2", "id: expected a Kaggle account, got the placeholder"),
        ("id", "a da/distill-t4x2", "id: expected a Kaggle account, got 'a da'"),
        ("id", None, "id: expected 'owner/slug', got None"),
        ("id_no", "12", "id_no: expected a whole number, got '12'"),
        ("id_no", True, "id_no: expected a whole number, got True"),
        ("title", "Distill", "title: expected one whose address is 'distill-t4x2', got 'Distill' with 'distill'"),
        ("title", "Dist", "title: expected at least 5 characters, got 'Dist'"),
        ("title", "Distill T4×2", "title: expected plain letters"),
        ("code_file", "", "code_file: expected a file's name, got ''"),
        ("code_file", "../x.ipynb", "code_file: expected a file beside kernel-metadata.json, got '../x.ipynb'"),
        ("code_file", "x.py", "code_file: expected a notebook (.ipynb), got 'x.py'"),
        ("language", "julia", "language: expected one of python, r, rmarkdown, got 'julia'"),
        ("kernel_type", None, "kernel_type: expected one of notebook, script, got None"),
        ("is_private", 1, "is_private: expected true or false, got 1"),
        ("enable_gpu", "true", "enable_gpu: expected true or false, got 'true'"),
        ("enable_tpu", None, "enable_tpu: expected true or false, got None"),
        ("enable_internet", ..., "enable_internet: expected true or false, got nothing"),
        ("enable_gpu", False, "enable_gpu: expected true beside machine_shape 'NvidiaTeslaT4', got False"),
        ("machine_shape", "NvidiaTeslaT4x2", "machine_shape: expected one of NvidiaTeslaT4, "),
        ("machine_shape", "TpuV38", "machine_shape: expected a machine that Kaggle still has, got 'TpuV38'"),
        ("machine_shape", None, "machine_shape: expected a machine's name, got None"),
        ("dataset_sources", "ada/data", "dataset_sources: expected a list of text, got 'ada/data'"),
        ("dataset_sources", ["data"], "dataset_sources: expected 'owner/slug' or 'owner/slug/version', got 'data'"),
        ("dataset_sources", ["ada/data/new"], "dataset_sources: expected 'owner/slug' or"),
        ("dataset_sources", ["OWNER/data"], "dataset_sources: expected a Kaggle account, got the placeholder in"),
        ("dataset_sources", ["ada/data", "ada/data"], "dataset_sources: expected every source once"),
        ("kernel_sources", ["ada/abc"], "kernel_sources: expected 'owner/slug' or 'owner/slug/version', the slug"),
        ("kernel_sources", [7], "kernel_sources: expected text, got 7"),
        ("competition_sources", ["ada/titanic"], "competition_sources: expected 'slug', got 'ada/titanic'"),
        ("model_sources", ["qwen-lm/qwen-3/transformers/0.6b"], "model_sources: expected 'owner/model/framework/"),
        ("model_sources", ["qwen-lm/qwen-3/transformers/0.6b/latest"], "model_sources: expected"),
        ("keywords", "gpu", "keywords: expected a list of text, got 'gpu'"),
        ("docker_image", "", "docker_image: expected text, got ''"),
        ("docker_image_pinning_type", "newest", "docker_image_pinning_type: expected one of original, latest"),
        ("enable_interent", True, "enable_interent: expected a key that Kaggle knows, got 'enable_interent'; did you"),
        ("timeout", 3, "timeout: expected a key that Kaggle knows, got 'timeout'; take it out"),
    ],
)
def test_each_problem_is_one_sentence(field, value, message):
    metadata = {key: v for key, v in {**GOOD, field: value}.items() if v is not ...}
    with pytest.raises(ValueError) as refused:
        validate(metadata)
    first, *lines = str(refused.value).splitlines()
    assert "has 1 problem:" in first
    assert [line.strip() for line in lines if line.strip().startswith(message)], lines
    assert len(lines) == 1 and "; " in lines[0], "expected, got; and what to do"


def test_all_problems_come_at_once():
    with pytest.raises(ValueError, match="has 4 problems:") as refused:
        validate({**GOOD, "title": "x", "is_private": "yes", "keywords": "a", "machine": "T4"})
    assert [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]] == [
        "machine",
        "title",
        "is_private",
        "keywords",
    ]


def test_what_is_allowed_passes():
    more = {
        "id_no": 12,
        "dataset_sources": ["ada/data", "ada/data2/3"],
        "kernel_sources": ["ada/other-kernel/12"],
        "competition_sources": ["titanic"],
        "model_sources": ["qwen-lm/qwen-3/transformers/0.6b/1"],
        "docker_image": "gcr.io/kaggle",
        "docker_image_pinning_type": "original",
    }
    assert validate({**GOOD, **more}) == []


def test_a_retired_p100_is_a_remark():
    (remark,) = validate({**GOOD, "machine_shape": "NvidiaTeslaP100"})
    assert "retired the P100" in remark and "T4 x2" in remark
    (remark,) = validate({key: value for key, value in GOOD.items() if key != "machine_shape"})
    assert "default GPU" in remark


def test_the_source_is_there_and_a_notebook_below_one_megabyte(tmp_path):
    def refused():
        with pytest.raises(ValueError) as error:
            validate(GOOD, tmp_path)
        return str(error.value)

    assert "code_file: expected" in refused() and "does not exist; build the kernel" in refused()
    code = tmp_path / GOOD["code_file"]
    code.write_text("not json")
    assert "code_file: expected a notebook, got" in refused()
    code.write_bytes(b"\xff")
    assert "expected text in UTF-8" in refused()
    code.write_text("[]")
    assert "an object with cells" in refused()

    def notebook(characters, letter="x"):
        cell = {"cell_type": "code", "source": [letter * characters], "outputs": ["y" * SOURCE_LIMIT], "metadata": {}}
        return json.dumps({"cells": [cell]}, ensure_ascii=False)

    room = SOURCE_LIMIT - len(sent_text(notebook(0)))
    code.write_text(notebook(room))
    assert validate(GOOD, tmp_path) == [], "outputs are not sent and do not count"
    code.write_text(notebook(room + 1))
    assert "code_file: expected at most 1,000,000 bytes of source, got 1,000,001" in refused()
    code.write_text(notebook(room // 4, "é"))
    assert "got 1,4" in refused(), "the client sends é as six characters"


def test_a_folder_is_validated_with_its_source(tmp_path):
    (tmp_path / METADATA).write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match="does not exist"):
        validate(tmp_path)
    (tmp_path / GOOD["code_file"]).write_text('{"cells": []}')
    assert validate(tmp_path) == []


@pytest.mark.parametrize(("text", "message"), [(None, "does not exist; build"), ("{", "JSON"), ("[]", "an object")])
def test_a_metadata_file_that_is_none(tmp_path, text, message):
    if text is not None:
        (tmp_path / METADATA).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    "title", ["Distill P100", "Debug loss magnitudes", "it's 1,000 -- of  them!", "A_b.c/d", "  x (y) 2.0 ", "---a---"]
)
def test_slugs_are_those_of_the_clients_own_library(title):
    from slugify import slugify

    assert slugified(title) == slugify(title)


def test_what_is_measured_is_what_the_client_sends():
    text = '{"cells": [{"cell_type": "code", "outputs": [1], "source": ["a\\n", "é"]}, {"cell_type": "raw"}], "x": 1}'
    assert sent_text(text) == (
        '{"cells": [{"cell_type": "code", "outputs": [], "source": "a\\n\\u00e9"}, {"cell_type": "raw"}], "x": 1}'
    )
