from __future__ import annotations

import copy
import enum
import importlib
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
from forks import Warm
from peft import PeftConfig, PeftType, get_peft_config

import peft_learners
from peft_learners import LearnerConfig, registry


@pytest.fixture
def python(warm: Warm, tmp_path: Path) -> Callable[[str], str]:
    """What code prints in a process that has imported PEFT and not the plugin."""
    return lambda code: warm.python(textwrap.dedent(code), log=tmp_path / "log")


def test_real_member():
    """The type is a real member of PEFT's enum."""
    member = PeftType.LEARNER
    assert isinstance(member, PeftType) and member.value == member.name == member == "LEARNER"
    assert PeftType("LEARNER") is PeftType["LEARNER"] is member and member in list(PeftType)
    assert copy.deepcopy(member) is copy.copy(member) is pickle.loads(pickle.dumps(member)) is member
    assert isinstance(get_peft_config({"peft_type": "LEARNER", "r": 3}), LearnerConfig)


@pytest.mark.parametrize("add", [registry._add_by_proto_member, registry._add_by_tables])
def test_add_member(add):
    """Both ways to add a member work."""
    if add is registry._add_by_proto_member and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no enum._proto_member; newer versions run this")
    if add is registry._add_by_tables and sys.version_info >= (3, 12):
        pytest.skip("members are class attributes since Python 3.12; 3.10 and 3.11 run this")

    class Kind(str, enum.Enum):
        OLD = "OLD"

    add(Kind, "NEW")
    member = Kind("NEW")
    assert member is Kind["NEW"] is Kind.NEW and list(Kind) == [Kind.OLD, member]
    assert isinstance(member, Kind) and (member.name, member.value, str.__str__(member)) == ("NEW",) * 3
    assert member == "NEW" and hash(member) == hash("NEW") and "NEW" in list(Kind)


def test_register_again():
    """Registering again changes nothing."""
    before = list(PeftType)
    registry.register(LearnerConfig, peft_learners.LearnerModel)
    importlib.reload(peft_learners)
    assert list(PeftType) == before


def test_name_taken():
    """Another owner of the name is refused."""

    class Other(PeftConfig):
        method = "learner"

    with pytest.raises(RuntimeError, match="PEFT's tables hold .*expected.*peft>=0.21.2,<0.22"):
        registry.register(Other, peft_learners.LearnerModel)


def test_changed_tables(python):
    """PEFT's tables in another shape are refused loudly."""
    out = python(
        """
        import peft.utils.peft_types, peft.utils, peft
        def strange(*, title, config): pass
        peft.utils.register_peft_method = strange
        try:
            import peft_learners
        except RuntimeError as error:
            print(error)
        """
    )
    assert "peft_learners can't register with PEFT" in out and "install that" in out


def test_pickled_member(python):
    """A pickled member is read where the plugin wasn't imported."""
    data = pickle.dumps(PeftType.LEARNER)
    assert python(f"import pickle; print(pickle.loads({data!r}))") in ("LEARNER", "PeftType.LEARNER")


def test_quick_import():
    """Importing needs no Trainer, and is quick. On top of `import peft` the plugin loads its own few modules: at most
    2.5 % of what PEFT itself takes (2 % before it counted costs and checked files)."""
    code = """
        import sys, time
        start = time.process_time(); import peft; between = time.process_time()
        before = set(sys.modules)
        import peft_learners; end = time.process_time()
        new = {name.partition('.')[0] for name in set(sys.modules) - before}
        assert new == {'peft_learners'}, new
        print((end - between) / (between - start))
    """
    ratio = 1.0
    for _ in range(3):  # a busy machine may spoil one
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ratio = min(ratio, float(done.stdout))
        if ratio < 0.025:
            break
    assert ratio < 0.025, f"importing peft_learners took {ratio:.1%} of the time of importing peft {peft.__version__}"


def test_lazy_callback(python):
    """`PhaseCallback` is a public name, loaded on demand."""
    out = python("import sys, peft_learners; from peft_learners import PhaseCallback; print(PhaseCallback.__module__)")
    assert out == "peft_learners.phases.callback"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        peft_learners.nothing  # noqa: B018
