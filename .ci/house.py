"""Checks the house: the length of files, functions and lines, and that imports point down only."""
import ast
import io
import sys
import tokenize
from pathlib import Path

MOST_IN_FILE, MOST_IN_FUNCTION, MOST_IN_LINE = 350, 50, 100
LONGER_FILES = {"pretrain.py": 380}  # the commit message says why a limit is raised
SCRIPTS = {"pretrain", "finetune"}  # imported by nobody
GROUND = {"masking", "contrastive", "transformer", "dalle", "data"}  # import only plumbing


def lines_of_code(source, tree):
    """The number of lines that are not blank, comment or docstring."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def imported(tree):
    """The modules that a file imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def faults(path, source, tree, top):
    """What a file does wrong -> [str]. top: the names of the modules at the top level."""
    lines = source.splitlines()
    limit = LONGER_FILES.get(str(path), MOST_IN_FILE)
    if len(lines) > limit:
        yield f"{path}: {len(lines)} lines, at most {limit}"
    for number, line in enumerate(lines, start=1):
        if len(line) > MOST_IN_LINE:
            yield f"{path}:{number}: {len(line)} characters, at most {MOST_IN_LINE}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > MOST_IN_FUNCTION:
                yield f"{path}: {node.name} has {length} lines, at most {MOST_IN_FUNCTION}"
    for name in set(imported(tree)) & (top - {path.stem}):
        if path.parts[0] == "plumbing" or path.stem in GROUND or name in SCRIPTS:
            yield f"{path} imports {name}: imports point down only"


def main():
    top, totals, wrong = {path.stem for path in Path().glob("*.py")}, [0, 0], []
    for path in sorted([*Path().glob("*.py"), *Path("plumbing").rglob("*.py")]):
        source = path.read_text()
        tree = ast.parse(source)
        code = lines_of_code(source, tree)
        totals[path.parts[0] == "plumbing"] += code
        print(f"{path!s:28} {len(source.splitlines()):4} lines {code:4} of code")
        wrong += faults(path, source, tree, top)
    print(f"{'all':28} {'':10} {sum(totals):4} of code, {totals[1]} in plumbing")
    for fault in wrong:
        print(fault, file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
