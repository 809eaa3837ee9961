"""Counters of energy as Linux shows them: packages added up, parts left out, and a counter that begins anew."""

from ftjax.verdict import energy


def counter(root, name, value, most=1_000_000):
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{value}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")


def test_packages_are_added_up_and_a_counter_may_begin_anew(tmp_path):
    counter(tmp_path, "intel-rapl:0", 900_000)
    counter(tmp_path, "intel-rapl:1", 100_000)
    counter(tmp_path, "intel-rapl:0:0", 5)
    with energy.metered(tmp_path) as meter:
        counter(tmp_path, "intel-rapl:0", 99_999)  # 200,000 more, beyond the end
        counter(tmp_path, "intel-rapl:1", 150_000)
        counter(tmp_path, "intel-rapl:0:0", 999)
    assert abs(meter.joules - 0.25) < 1e-9
    with energy.metered(tmp_path / "none") as meter:
        pass
    assert meter.joules is None


def test_readings_in_between_count_each_turn_of_a_counter(tmp_path, monkeypatch):
    counter(tmp_path, "intel-rapl:0", 0)
    meter = energy.Meter(tmp_path)
    for value in (600_000, 200_000, 900_000):
        counter(tmp_path, "intel-rapl:0", value)
        meter.read()
    assert abs(meter.joules - 1.900001) < 1e-9
