"""The exported folder alone is enough, and the shipped files obey what the library's loader needs."""

import ast
import json
import re
import shutil
import sys

import pytest

from scripts.export import AUTO_MAP, remote_code_files
from tests.paths import REPOSITORY

FILES = {file.name: file.read_text(encoding="utf-8") for file in remote_code_files()}
TREES = {name: ast.parse(source) for name, source in FILES.items()}
REQUIRED = {"torch", "transformers", "huggingface_hub"}

# Loads everything from sys.argv[1] (a folder, or the name of a repository in the offline Hub cache), saves it into
# sys.argv[2], loads it again, and compares.
EVERYTHING = """
import json, os, sys
name, out, os.environ["HF_HOME"] = sys.argv[1:]
os.environ["HF_HUB_OFFLINE"] = "1"
import torch, transformers
from transformers import AutoConfig, AutoTokenizer
remote = {"trust_remote_code": True}

config = AutoConfig.from_pretrained(name, **remote)
assert config.model_type == "mlra" and config.num_head_groups == 2, config
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
inputs = tokenizer(["Hello world", "Hello"], padding=True, return_tensors="pt")
for refused in (AutoConfig, transformers.AutoModelForCausalLM):
    try:
        refused.from_pretrained(name, trust_remote_code=False)
    except ValueError:
        continue
    raise SystemExit("code ran without trust_remote_code")

classes = {}
heads = ("AutoModelForQuestionAnswering", "AutoModelForSequenceClassification", "AutoModelForTokenClassification")
for auto in (*heads, "AutoModel", "AutoModelForCausalLM"):
    model = getattr(transformers, auto).from_pretrained(name, **remote).eval()
    classes[auto] = type(model).__name__
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert type(model.config).__name__ == "MLRAConfig"
    with torch.no_grad():
        first = model(**inputs)[0]
    kept = f"{out}/{auto}"
    model.save_pretrained(kept)
    tokenizer.save_pretrained(kept)
    again = getattr(transformers, auto).from_pretrained(kept, **remote).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], first)
    if auto == "AutoModelForCausalLM":
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(again.generate(**inputs, max_new_tokens=6, do_sample=False), ids)
        kept_tokenizer = AutoTokenizer.from_pretrained(kept, trust_remote_code=False)
        assert kept_tokenizer.decode([1, 2, 3]) == tokenizer.decode([1, 2, 3])
        outputs = model(**inputs, use_cache=True)
        cache = outputs.cache if "cache" in outputs else outputs.past_key_values
        assert "MLRACache" in [base.__name__ for base in type(cache).__mro__]
print(json.dumps({"classes": classes, "ids": ids.tolist()}))
"""


@pytest.fixture(scope="module")
def expected_ids(converted):
    from transformers import AutoTokenizer

    from modeling_mlra import MLRAForCausalLM

    folder = converted("mlra_2_gated")
    inputs = AutoTokenizer.from_pretrained(folder)(["Hello world", "Hello"], padding=True, return_tensors="pt")
    model = MLRAForCausalLM.from_pretrained(folder)
    return model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()


@pytest.mark.parametrize("place", ["folder", "hub cache"])
def test_folder_works_where_the_package_cannot_be_imported(tmp_path, converted, run_isolated, expected_ids, place):
    name, folder = "folder-name.with.dots", converted("mlra_2_gated")
    if place == "folder":
        shutil.copytree(folder, tmp_path / name)
        name = tmp_path / name
    else:
        commit = "f" * 40
        name, repository = "some-org/MLRA-2.gated", tmp_path / "home" / "hub" / "models--some-org--MLRA-2.gated"
        (repository / "blobs").mkdir(parents=True)
        (repository / "snapshots" / commit).mkdir(parents=True)
        for file in folder.iterdir():  # as a download leaves them: links into blobs/
            shutil.copy(file, repository / "blobs" / file.name)
            (repository / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    result = json.loads(run_isolated(EVERYTHING, name, tmp_path / "saved", tmp_path / "home").splitlines()[-1])
    assert result["classes"] == {
        "AutoModel": "MLRAModel",
        "AutoModelForCausalLM": "MLRAForCausalLM",
        "AutoModelForQuestionAnswering": "MLRAForQuestionAnswering",
        "AutoModelForSequenceClassification": "MLRAForSequenceClassification",
        "AutoModelForTokenClassification": "MLRAForTokenClassification",
    }
    assert result["ids"] == expected_ids
    for auto in list(AUTO_MAP)[1:]:
        saved = tmp_path / "saved" / auto
        assert {file.name for file in saved.glob("*.py")} == FILES.keys()
        assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_importing_the_package_registers_the_auto_classes(converted):
    import transformers

    import modeling_mlra

    folder = converted("mlra_4")
    assert type(transformers.AutoConfig.from_pretrained(folder)) is modeling_mlra.MLRAConfig
    for auto, target in list(AUTO_MAP.items())[1:]:
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=False)
        assert type(model) is getattr(modeling_mlra, target.split(".")[1])


# Laws of the shipped files


def imports_of(tree: ast.AST):
    """(node, [ancestors]) of every import statement, outermost ancestor first."""

    def walk(node, ancestors):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, ancestors
            yield from walk(child, [*ancestors, child])

    yield from walk(tree, [])


def modules_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Absolute modules that an import statement names; none for a relative one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [] if node.level else [node.module]


def test_every_file_but_init_is_shipped():
    package = {file.name for file in (REPOSITORY / "modeling_mlra").rglob("*.py")}
    assert FILES.keys() == package - {"__init__.py"}
    assert {"configuration_mlra.py", "modeling_mlra.py"} <= FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_law_1_imports_are_flat(name):
    relative = set()
    for node, _ in imports_of(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno} leaves the folder"
            assert node.module, f"line {node.lineno}: from . import is not followed by the loader"
            assert f"{node.module}.py" in FILES, f"line {node.lineno}: no {node.module}.py to ship"
            relative.add(node.module)
        assert not any(module.split(".")[0] == "modeling_mlra" for module in modules_of(node))
    # The loader searches the text, so a docstring line must not look like an import, nor one hide from it.
    assert set(re.findall(r"^\s*from\s+\.(\S+)\s+import", FILES[name], flags=re.MULTILINE)) == relative
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search(r"^\s*(from\s+\S+\s+import\b|import\s+\S)", node.value, flags=re.MULTILINE), (
                node.value
            )


@pytest.mark.parametrize("name", FILES)
def test_law_2_optional_packages_are_guarded(name):
    for node, ancestors in imports_of(TREES[name]):
        for module in modules_of(node):
            root = module.split(".")[0]
            if root in REQUIRED or root in sys.stdlib_module_names:
                continue
            assert ancestors and isinstance(ancestors[0], ast.Try), f"{root}: not in a module-level try"
            assert not any(isinstance(a, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for a in ancestors)
            types = (handler.type for handler in ancestors[0].handlers)
            handled = {getattr(kind, "id", None) for types_ in types for kind in getattr(types_, "elts", [types_])}
            assert "ImportError" in handled, f"{root}: its absence is not handled"


@pytest.mark.parametrize("name", FILES)
def test_law_3_no_isinstance_of_the_config(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "issubclass"):
            assert "MLRAConfig" not in ast.unparse(node.args[1])


@pytest.mark.parametrize("name", FILES)
def test_law_5_only_public_names_of_transformers(name):
    for node, _ in imports_of(TREES[name]):
        for module in modules_of(node):
            if module.split(".")[0] != "transformers":
                continue
            assert not module.startswith("transformers.models"), f"line {node.lineno}: {module}"
            parts = [*module.split("."), *(alias.name for alias in node.names)]
            assert not any(part.startswith("_") for part in parts), f"line {node.lineno}: private name in {parts}"


def test_law_6_what_the_library_searches_the_model_file_for():
    names = {getattr(node, "name", None) for node in TREES["modeling_mlra.py"].body}
    assert {"MLRAAttention", "eager_attention_forward"} <= names
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in FILES["modeling_mlra.py"]


@pytest.mark.parametrize("name", FILES)
def test_files_import_public_names_of_each_other(name):
    for node, _ in imports_of(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            assert not private, f"line {node.lineno}: {private} of {node.module}"


def test_imports_form_the_documented_graph():
    graph = {
        name.removesuffix("_mlra.py"): {
            node.module.removesuffix("_mlra")
            for node, _ in imports_of(tree)
            if isinstance(node, ast.ImportFrom) and node.level
        }
        for name, tree in TREES.items()
    }
    assert graph["configuration"] == set() and graph["rows"] == set() and graph["cache"] == {"rows"}
    roots = {
        module.split(".")[0] for node, _ in imports_of(TREES["configuration_mlra.py"]) for module in modules_of(node)
    }
    assert "torch" not in roots
    done: set[str] = set()
    while remaining := graph.keys() - done:  # take away files whose imports are all gone: a cycle never goes
        free = {name for name in remaining if graph[name] <= done}
        assert free, f"import cycle among {sorted(remaining)}"
        done |= free
