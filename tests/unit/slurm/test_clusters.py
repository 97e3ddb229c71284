"""Tests how tables of clusters are read: text without quotes, and what is refused."""

import re
from pathlib import Path

import pytest

from slurm.clusters import load_cluster


@pytest.mark.parametrize("name", ["dgx", "academic", "cloud"])
def test_example_clusters_are_valid(name: str) -> None:
    assert load_cluster(name).local_disk is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a]\npartitoin = 'x'", "a.partitoin is unknown; did you mean partition?"),
        ("[a]\ndevices = 'eight'", "a.devices is 'eight'; it must be an integer"),
        ("[a]\nsignal = 'USR3'", "signal is USR3; did you mean USR"),
        ("[a]\nsignal_ahead_s = 0", "signal_ahead_s is 0; give seconds"),
        ("[a]\nextra = ['rm -rf']", "extra holds 'rm -rf'; give options of sbatch"),
        ("[a]\nenvironment = { 'A B' = 1 }", "environment holds 'A B'; give names of variables"),
        ("[a]\nmodules = 3", "a.modules is 3"),
        ("a = 3", "a is 3; it must be a table"),
        ("[a", "is not TOML"),
        ("[a]\ntime = 2:00:00", 'write UTF-8, and text in quotes: time = "1-12:00:00"'),
        ("[a]\naccount = 'caf\udce9'", "is not TOML: 'utf-8' codec can't decode byte 0xe9"),
        ("[a]\ntime = 1.5", "a.time is 1.5; it must be text: write it in quotes"),
        ("[a]\ntime = 2026-01-01", "a.time is 2026-01-01; it must be text: write it in quotes"),
        ("[a]\naccount = true", "a.account is True; it must be text: write it in quotes"),
        ("[a]\nmodules = [['x']]", "a.modules"),
        (
            "[a]\nenvironment = { A = false }",
            "a.environment.A is False; it must be text: write it in quotes",
        ),
        ("[a]\nmax_array_tasks = -1", "max_array_tasks is -1; give a number, or 0"),
        ("[a]\ngpu_request = 'gpus'", "a.gpu_request is 'gpus'; it must be"),
        (
            "[a]\naccount = '$PROJECT'",
            "account is '$PROJECT', which holds $PROJECT; sbatch expands",
        ),
        *(
            (f"[a]\nextra = ['{option}']", f"extra holds '{option}', which does not say how many")
            for option in ("--gpus-per-socket=4", "--ntasks-per-gpu=1")
        ),
        ("[a]\nextra = ['--error=~/x']", "extra is '~/x', which holds ~; sbatch expands nothing"),
        ('[a]\nextra = ["--a=b\\u0001"]', "extra holds '--a=b\\x01'; give options of sbatch"),
        ("[a]\nlocal_disk = '~anna/x'", "local_disk is '~anna/x', which holds ~anna; write a path"),
        ("[a]\nlocal_disk = '/x/${HOSTNAME}'", "which holds ${HOSTNAME; write a path that all"),
        ("[a]\nlocal_disk = 'x:~anna'", "which holds ~anna; write a path that all nodes share"),
        ("[a]\nenvironment = { A = '$SLURM_NODEID' }", "A is '$SLURM_NODEID', which holds"),
        ("[a]\ndevices = 1.5", "a.devices is 1.5; it must be an integer"),
        ("[a]\naccount = 62117e96", "it must be text: write it in quotes"),
        (
            "[a]\nlocal_disk = '/x/${PLACE:-$USER}'",
            "a.local_disk is '/x/${PLACE:-$USER}', which holds ${; only $NAME and ${NAME} are read",
        ),
        ("[a]\nmodules = ['$(id)']", "modules is '$(id)', which holds $(; only $NAME"),
        ("[a]\nenvironment = { A = '`id`' }", "environment.A is '`id`', which holds `; only $NAME"),
        ("[a]\npython = '/x/$1'", "python is '/x/$1', which holds $; only $NAME and ${NAME}"),
        ("[a]\nenvironment = ['A=1']", """environment is ['A=1']; it must be a table: { NAME ="""),
        ("[a]\nmodules = { A = 'b' }", "modules is {'A': 'b'}; it must be a list"),
        ('[a]\nmodules = ["x\\u0000"]', "modules is 'x\\x00', with a zero byte; leave it out"),
        ("[a]\naccount = 0x1f", "account is 31; it must be text: write it in quotes"),
        ("[a]\naccount = 1_000", "account is 1000; it must be text: write it in quotes"),
        ("[a]\nextra = [1.5]", "a.extra is 1.5; it must be text: write it in quotes"),
        ("[b]", "cluster is a, and"),
    ],
)
def test_invalid_clusters_are_refused_with_their_key(
    text: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "clusters.toml"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        load_cluster("a", path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "time"),
    [
        ("02:00:00", "02:00:00"),
        ("00:00:00", "00:00:00"),
        ("90", "90"),
        ("0", "0"),
        ("-1", "-1"),
        ("'1-0'", "1-0"),
        ('"UNLIMITED"', "UNLIMITED"),
    ],
)
def test_a_time_without_quotes_is_read_as_it_is_written(
    value: str, time: str, tmp_path: Path
) -> None:
    path = tmp_path / "clusters.toml"
    path.write_text(f"\ufeff[a]\ntime = {value}\n", encoding="utf-8")
    assert load_cluster("a", path).time == time


def test_whole_numbers_are_text_where_text_belongs(tmp_path: Path) -> None:
    path = tmp_path / "clusters.toml"
    path.write_text("[a]\naccount = 4711\ndevices = 4\nenvironment = { OMP_NUM_THREADS = 8 }\n")
    cluster = load_cluster("a", path)
    assert (cluster.account, cluster.devices) == ("4711", 4)
    assert cluster.environment == (("OMP_NUM_THREADS", "8"),)


def test_an_escaped_name_of_a_variable_is_text(tmp_path: Path) -> None:
    path = tmp_path / "clusters.toml"
    path.write_text(r"""[a]
local_disk = '/x/\$HOSTNAME/\~anna'""")
    assert load_cluster("a", path).local_disk == r"/x/\$HOSTNAME/\~anna"


def test_a_number_of_a_cluster_is_read_as_an_option_is(tmp_path: Path) -> None:
    path = tmp_path / "clusters.toml"
    path.write_text("[a]\ndevices = '8'\nsignal_ahead_s = 1e2\naccount = 12\nenvironment = {N = 4}")
    cluster = load_cluster("a", path)
    assert (cluster.devices, cluster.signal_ahead_s, cluster.account) == (8, 100, "12")
    assert cluster.environment == (("N", "4"),)
