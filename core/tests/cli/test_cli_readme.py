"""The README tells the truth: its table is generated, its example runs, its links lead somewhere."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from polydraft.plugins import default_host

ROOT = Path(__file__).parents[3]
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="the repository's README is not beside these tests")


def rows(text):
    return {line for line in text.splitlines() if line.startswith("| `")}


def test_the_table_is_what_the_backends_declare():
    spec = importlib.util.spec_from_file_location("ci_readme", ROOT / "ci/readme.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = README.read_text(encoding="utf-8")
    inside = text.partition(script.BEGIN)[2].partition(script.END)[0]
    # Only what is installed can be compared.
    assert rows(script.table()) <= rows(inside), "run `nox -s readme`"
    assert script.filled(text, inside) == text


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_lead_somewhere(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    targets = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    for target in targets:
        path, _, anchor = target.partition("#")
        there = ROOT / path if path else ROOT / file
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def builtin_pair_runs():
    host = default_host()
    return "tiny-e2b" in host.local_models() and "transformers" in host.backends()


def run(code, *arguments):
    done = subprocess.run([sys.executable, *code, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_builtin_pair = pytest.mark.skipif(
    not builtin_pair_runs(), reason="needs polydraft-transformers and polydraft-builtin-pairs"
)


@needs_builtin_pair
def test_the_example_of_the_readme():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code.count("google/gemma-4-E4B-it") == 1
    small = code.replace("google/gemma-4-E4B-it", "builtin:tiny-e2b").replace("max_new_tokens=256", "max_new_tokens=20")
    out = run(["-c", small.replace("seed=1", "seed=1, max_new_tokens=20")])
    # Acceptance rate and mean acceptance length; None where the small model ends before a draft was made.
    assert re.search(r"(None|[01]\.\d+) (None|\d\.\d+)", out)


# ray_data_batch.py takes a cluster and an engine for batches: plugins/vllm/long_tests runs it.
@needs_builtin_pair
@pytest.mark.parametrize(
    "file", sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name != "ray_data_batch.py")
)
def test_examples(file):
    out = run([str(ROOT / "examples" / file)])
    assert out.strip()
    if file == "generate.py":
        assert "identical: True" in out
