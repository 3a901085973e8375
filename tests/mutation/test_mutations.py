"""The list of mutations applies to today's code."""

from collections import Counter

from tests.mutation.check import ROOT, find_problem, read_mutations


def test_every_mutation_applies_and_is_valid_python():
    mutations = read_mutations()
    assert not [problem for problem in map(find_problem, mutations) if problem]
    for m in mutations:
        assert m.new != m.old, m
        compile((ROOT / m.file).read_text().replace(m.old, m.new), m.file, "exec")


def test_mutations_differ_and_cover_every_directory():
    mutations = read_mutations()
    assert len({(m.file, m.old, m.new) for m in mutations}) == len(mutations) >= 60
    assert len({(m.file, m.mistake) for m in mutations}) == len(mutations)  # results are kept under these
    directories = Counter(m.file.split("/")[0] for m in mutations)
    assert all(directories[name] >= 10 for name in ("train_gpt.py", "train", "model", "data", "eval"))
