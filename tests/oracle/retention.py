# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later
"""A second implementation of lbvm's retention, compared on random histories.

It knows nothing of the C library's time zones: a zone is an offset, and the two
moments of a year at which clocks change, computed here from the rules that the
POSIX form of TZ states. So no zone data need be installed, and zones may be as
odd as any that ever was.
"""

import datetime
import os
import random
import subprocess
import unittest

BUILD = os.environ.get("abs_top_builddir", os.path.join(
    os.path.dirname(os.path.abspath(__file__)), "..", "..", "build"))
NAMES = ["last", "hourly", "daily", "weekly", "monthly", "yearly"]
EPOCH = datetime.datetime(1970, 1, 1)
HOUR = 3600


class Zone:
    """Winter and summer time, in seconds east of Greenwich; begin and end of
    summer as (month, week, weekday from Sunday, seconds of the local day)."""

    def __init__(self, winter, summer=None, begin=None, end=None):
        self.winter, self.summer = winter, summer
        self.begin, self.end = begin, end
        self.years = {}

    def tz(self):
        def offset(seconds):
            sign = "-" if seconds > 0 else ""  # POSIX counts westward
            return sign + clock(abs(seconds))

        def clock(seconds):
            return (f"{seconds // HOUR}:{seconds // 60 % 60:02}:"
                    f"{seconds % 60:02}")

        text = "WIN" + offset(self.winter)
        if self.summer is not None:
            text += "SUM" + offset(self.summer)
            for month, week, day, second in (self.begin, self.end):
                text += f",M{month}.{week}.{day}/{clock(second)}"
        return text

    @staticmethod
    def moment(year, rule, offset):
        """In UTC, of a rule that is stated in the local time before it."""
        month, week, day, second = rule
        days = [datetime.date(year, month, 1) + datetime.timedelta(n)
                for n in range(31)]
        days = [d for d in days
                if d.month == month and d.isoweekday() % 7 == day]
        date = days[min(week, len(days)) - 1]
        midnight = datetime.datetime(date.year, date.month, date.day)
        return int((midnight - EPOCH).total_seconds()) + second - offset

    def local(self, seconds):
        offset = self.winter
        if self.summer is not None:
            year = (EPOCH + datetime.timedelta(
                seconds=seconds + self.winter)).year
            if year not in self.years:
                self.years[year] = (
                    self.moment(year, self.begin, self.winter),
                    self.moment(year, self.end, self.summer))
            begin, end = self.years[year]
            if begin < end:
                summer = begin <= seconds < end
            else:  # on the southern half
                summer = not end <= seconds < begin
            if summer:
                offset = self.summer
        return EPOCH + datetime.timedelta(seconds=seconds + offset)


def period(rule, zone, seconds):
    t = zone.local(seconds)
    return {
        "last": seconds,
        "hourly": (t.year, t.month, t.day, t.hour),
        "daily": (t.year, t.month, t.day),
        "weekly": tuple(t.isocalendar())[:2],
        "monthly": (t.year, t.month),
        "yearly": t.year,
    }[rule]


def retention(keep, zone, times):
    """The rule that keeps each time; as tools/vm/retention.h states it."""
    kept = ["-"] * len(times)
    for rule, number in zip(NAMES, keep):
        def key(i):
            # two backups may be of one second
            return i if rule == "last" else period(rule, zone, times[i])

        done = {key(i) for i in range(len(times)) if kept[i] != "-"}
        for i in reversed(range(len(times))):
            if number == 0:
                break
            if key(i) not in done:
                done.add(key(i))
                kept[i] = rule
                number -= 1
    return kept


BERLIN = Zone(HOUR, 2 * HOUR, (3, 5, 0, 2 * HOUR), (10, 5, 0, 3 * HOUR))
# as it was until 2011: a minute after midnight, so that a day comes twice
ST_JOHNS = Zone(-12600, -9000, (3, 2, 0, 60), (11, 1, 0, 60))
LORD_HOWE = Zone(37800, 39600, (10, 1, 0, 2 * HOUR), (4, 1, 0, 2 * HOUR))
AUCKLAND = Zone(12 * HOUR, 13 * HOUR, (9, 5, 0, 2 * HOUR), (4, 1, 0, 3 * HOUR))
ZONES = [Zone(0), BERLIN, ST_JOHNS, LORD_HOWE, AUCKLAND,
         Zone(14 * HOUR), Zone(-12 * HOUR), Zone(20700)]


def compare(test, zone, cases):
    """cases: (keep, times)"""
    program = os.path.join(BUILD, "tests", "unit", "retentionctl")
    lines = "".join(" ".join(map(str, [*keep, *times])) + "\n"
                    for keep, times in cases)
    result = subprocess.run([program], input=lines, text=True, check=True,
                            stdout=subprocess.PIPE,
                            env={**os.environ, "TZ": zone.tz()})
    answers = result.stdout.split("\n")[:-1]
    test.assertEqual(len(answers), len(cases))
    for (keep, times), answer in zip(cases, answers):
        test.assertEqual(answer.split(), retention(keep, zone, times),
                         f"TZ={zone.tz()} {keep} {times}")


def at(year, month, day, hour=0, minute=0):
    return int((datetime.datetime(year, month, day, hour, minute)
                - EPOCH).total_seconds())


def history(rng):
    """Times of backups, of a machine whose clock may go back."""
    step = rng.choice([900, HOUR, 6 * HOUR, 24 * HOUR, 7 * 24 * HOUR])
    now = rng.randrange(at(2020, 1, 1), at(2031, 1, 1))
    times = []
    for _ in range(rng.randrange(0, 120)):
        times.append(now)
        now += step + rng.randrange(-step // 2, step // 2)
        if rng.random() < 0.03:
            now -= rng.randrange(0, 5 * step)
        if rng.random() < 0.03:
            now += rng.randrange(0, 100 * step)
    return sorted(times)


class Retention(unittest.TestCase):

    def random_histories(self, zone, seed):
        rng = random.Random(seed)
        cases = []
        for _ in range(150 if not os.environ.get("QLB_NIGHTLY") else 5000):
            keep = [rng.choice([0, 0, 1, 2, 3, rng.randrange(40)])
                    for _ in NAMES]
            cases.append((keep, history(rng)))
        compare(self, zone, cases)

    def test_random_histories_in_known_zones(self):
        for number, zone in enumerate(ZONES):
            self.random_histories(zone, number)

    def test_random_histories_in_random_zones(self):
        rng = random.Random(5)
        for number in range(10):
            winter = rng.randrange(-12 * 60, 13 * 60) * 60
            rules = [(month, rng.randrange(1, 6), rng.randrange(7),
                      rng.randrange(24 * HOUR)) for month in (4, 9)]
            if rng.random() < 0.5:
                rules.reverse()
            self.random_histories(
                Zone(winter, winter + rng.choice([1800, HOUR, 2 * HOUR]),
                     *rules), 100 + number)

    def test_every_hour_around_a_change_of_clocks(self):
        cases = []
        for zone in (BERLIN, ST_JOHNS, LORD_HOWE, AUCKLAND):
            cases = []
            for moment in (Zone.moment(2026, zone.begin, zone.winter),
                           Zone.moment(2026, zone.end, zone.summer)):
                for step in (600, 1800, HOUR):
                    times = [moment + n * step for n in range(-60, 60)]
                    cases += [([0, n, 0, 0, 0, 0], times)
                              for n in (1, 2, 5, 30)]
                    cases += [([0, n, m, 1, 1, 1], times)
                              for n in (0, 3) for m in (1, 2, 3)]
            compare(self, zone, cases)

    def test_weeks_at_the_turn_of_years(self):
        cases = []
        for year in range(2000, 2030):
            times = [at(year, 12, 20, 12) + n * 24 * HOUR for n in range(25)]
            cases += [([0, 0, 0, 4, 0, 0], times), ([0, 0, 2, 2, 1, 1], times)]
        compare(self, BERLIN, cases)

    def test_the_oracle_by_hand(self):
        """Two Sundays ago, with Berlin's clocks."""
        times = [at(2026, 10, 24, 22, 30), at(2026, 10, 25, 0, 30),
                 at(2026, 10, 25, 1, 30), at(2026, 10, 25, 2, 30)]
        # 00:30, 02:30 in summer, 02:30 in winter, 03:30
        self.assertEqual(retention([0, 9, 0, 0, 0, 0], BERLIN, times),
                         ["hourly", "-", "hourly", "hourly"])
        self.assertEqual(retention([1, 1, 5, 0, 0, 0], BERLIN, times),
                         ["-", "-", "hourly", "last"])


if __name__ == "__main__":
    unittest.main()
