"""Runs every notebook from top to bottom and compares it with what is committed.

    python .ci/notebooks.py FOLDER      the executed copies go there

Wrong is: an error, a warning or anything else on stderr, execution counts that are not 1..n, a file above 2 MB, a
function or class named like one of the project's, and a printed number that is not the committed one. Cells tagged
`trained` print what training gave, which differs a little from machine to machine: there numbers may differ by a
quarter, or by two units of their last digit. Cells tagged `varies` (versions, single tokens) are not compared.
"""
import ast
import copy
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

MOST_BYTES = 2 * 2**20


def project_names():
    """Functions and classes of the project's modules."""
    for path in [*Path().glob("*.py"), *Path("plumbing").glob("*.py")]:
        yield from (node.name for node in ast.parse(path.read_text()).body
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main")


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def numbers(text):
    return re.findall(r"(?<![\w.])-?\d[\d,]*\.?\d*", text)


def alike(before, now, trained):
    """Whether two printed numbers are the same, or near enough."""
    if before == now:
        return True
    a, b = (float(number.replace(",", "")) for number in (before, now))
    digit = 10.0 ** -len(before.partition(".")[2])  # the last one
    return abs(a - b) <= (max(0.25 * abs(a), 2 * digit) if trained else 1.01 * digit * ("." in before))


def check(path, out):
    """-> what is wrong with a notebook [str]."""
    committed, faults = nbformat.read(path, as_version=4), []
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    if path.stat().st_size > MOST_BYTES:
        faults.append(f"{path.stat().st_size} bytes, {MOST_BYTES} at most")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        faults.append("its cells were not run once, from top to bottom")
    for cell in code:
        taken = set(re.findall(r"^\s*(?:def|class) (\w+)", cell.source, re.MULTILINE)) & set(project_names())
        faults += [f"defines {name} a second time" for name in sorted(taken)]
    fresh = copy.deepcopy(committed)
    NotebookClient(fresh, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(fresh, Path(out) / path.name)
    for number, (before, now) in enumerate(zip(code, (c for c in fresh.cells if c.cell_type == "code")), 1):
        tags = before.metadata.get("tags", [])
        noise = [o.text for o in [*before.outputs, *now.outputs] if o.get("name") == "stderr"]
        faults += [f"cell {number} writes to stderr: {text.strip()[:200]}" for text in noise]
        pairs = list(zip(numbers(printed(before)), numbers(printed(now))))
        if "varies" not in tags and (len(numbers(printed(before))) != len(numbers(printed(now))) or any(
                not alike(a, b, "trained" in tags) for a, b in pairs)):
            faults.append(f"cell {number} prints\n{printed(now)}where this is committed:\n{printed(before)}")
    return faults


def main():
    wrong = False
    for path in sorted(Path("notebooks").glob("*.ipynb")):
        start = time.perf_counter()
        faults = check(path, sys.argv[1])
        print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)
        for fault in faults:
            print(f"  {fault}", file=sys.stderr)
        wrong |= bool(faults)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
