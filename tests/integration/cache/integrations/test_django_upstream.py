"""Django's own tests of cache back ends. Its wheel does not have them; the sdist of the same version does."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

django = pytest.importorskip("django", reason="Django is not installed")

NOT_OURS = {
    "test_data_types": "stores a function and a class: only pickle can, by importing them",
    "test_cache_read_for_model_instance_with_deferred": "stores a query set, not its rows",
    "test_cache_write_for_model_instance_with_deferred": "stores a query set, not its rows",
}
"""What cannot pass without pickle."""

HARNESS = """
import json, sys, unittest
sys.path.insert(0, sys.argv[1])
from django.conf import settings
settings.configure(
    ALLOWED_HOSTS=["*"], INSTALLED_APPS=["cache"], SECRET_KEY="tests", USE_TZ=False, ROOT_URLCONF=[],
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    DATABASES={name: {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"} for name in ("default", "other")},
)
import django
django.setup()
from cache import tests as upstream
from django.test import TestCase, override_settings
from django.test.runner import DiscoverRunner

BACKEND = "headrace.cache.integrations.django.HeadraceCache"

OPTIONS = {"remote": {"timeout": 20.0, "connect_timeout": 20.0}} if sys.argv[2] else {}

@override_settings(CACHES=upstream.caches_setting_for_tests(
    BACKEND=BACKEND, LOCATION=sys.argv[2], OPTIONS=OPTIONS, exclude={"cull", "zero_cull"}
))
class HeadraceCacheTests(upstream.BaseCacheTests, TestCase):
    pass

DiscoverRunner(verbosity=0).setup_databases()
tests = unittest.defaultTestLoader.loadTestsFromTestCase(HeadraceCacheTests)
result = unittest.TextTestRunner(verbosity=0).run(tests)
bad = {}
for test, text in result.errors + result.failures:
    bad[getattr(test, "test_case", test)._testMethodName] = text
print(json.dumps({"run": result.testsRun, "bad": bad, "skipped": len(result.skipped)}))
"""


@pytest.fixture(scope="session")
def upstream_tests() -> Path:
    """Django's tests, of the very version that is installed, kept for the next run."""
    version = django.__version__
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = caches / "headrace-tests"
    tests = directory / f"django-{version}" / "tests"
    if not (tests / "cache" / "tests.py").exists():
        directory.mkdir(parents=True, exist_ok=True)
        what = ["--no-deps", "--no-binary", ":all:", "--quiet", "--dest", str(directory), f"django=={version}"]
        fetched = subprocess.run(
            [sys.executable, "-m", "pip", "download", *what], capture_output=True, text=True, timeout=100, check=False
        )
        if fetched.returncode != 0:
            pytest.skip(f"the sdist of Django {version} cannot be fetched: {fetched.stderr.strip()[-200:]}")
        (archive,) = directory.glob(f"[Dd]jango-{version}.tar.gz")
        with tarfile.open(archive) as sdist:
            for member in sdist.getmembers():
                _, _, inner = member.name.partition("/")
                if inner.startswith("tests/cache/"):
                    member.name = f"django-{version}/{inner}"
                    sdist.extract(member, directory, filter="data")
    return tests


@pytest.mark.slow
@pytest.mark.parametrize("where", ["redis", "memory"])
def test_djangos_own_tests_pass(upstream_tests: Path, server, where: str):
    """BaseCacheTests pass on Redis and on memory alone, but for the three that need pickle."""
    location = server.url if where == "redis" else ""
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(upstream_tests), location],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["bad"]) == set(NOT_OURS), report["bad"]
    assert report["run"] >= 50
    assert report["skipped"] <= 3  # culling, which is ours to do by policy
