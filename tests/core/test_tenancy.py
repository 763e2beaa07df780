"""Which objects and policies a tenant may use, and which tenant has an object. All attacks on the comparison itself."""

import pytest

from services.core.settings import Settings, load
from services.core.tenancy import NOT_SEPARATED, UNLIMITED, Limit, Tenancy

TENANCY = Tenancy(
    (
        "a=s3://uploads/a/",
        "b=s3://uploads/b/",
        "b=s3://b-only",
        "shop=s3://uploads/b/shop/",
        "c=s3://shared/",
        "d=s3://shared",
    ),
    ("a=strict", "nobody=strict"),
)


@pytest.mark.parametrize(
    ("tenant", "bucket", "key", "is_allowed"),
    [
        ("a", "uploads", "a/cat.jpg", True),
        ("a", "uploads", "a/", True),
        ("a", "uploads", "b/cat.jpg", False),
        ("a", "uploads", "a", False),
        ("a", "uploads", "a2/cat.jpg", False),
        ("a", "uploads", "A/cat.jpg", False),
        ("a", "uploads", "/a/cat.jpg", False),
        ("a", "uploads", "x/a/cat.jpg", False),
        ("a", "uploads", "", False),
        ("a", "b-only", "a/cat.jpg", False),
        ("a", "Uploads", "a/cat.jpg", False),
        ("b", "b-only", "cat.jpg", True),
        ("b", "b-only-2", "cat.jpg", False),
        ("shop", "uploads", "b/shop/cat.jpg", True),
        ("shop", "uploads", "b/cat.jpg", False),
        ("nobody", "uploads", "a/cat.jpg", False),
        ("default", "uploads", "a/cat.jpg", False),
        ("", "uploads", "cat.jpg", False),
    ],
)
def test_tenant_may_use_only_objects_below_its_prefixes(tenant: str, bucket: str, key: str, is_allowed: bool) -> None:
    assert TENANCY.find_scope(tenant).allows_object(bucket, key) is is_allowed


def test_tenant_may_use_only_its_own_and_its_listed_policies() -> None:
    scope = TENANCY.find_scope("a")
    assert scope.has_policy_limit
    assert scope.allows_policy("strict", own_policy="default")
    assert scope.allows_policy("default", own_policy="default")
    assert not scope.allows_policy("default", own_policy="shop")
    assert not scope.allows_policy("other", own_policy="default")
    assert not TENANCY.find_scope("b").allows_policy("strict", own_policy="default")
    assert TENANCY.find_scope("unlisted").allows_policy("default", own_policy="default")


def test_the_document_of_all_tenants_is_in_no_limited_scope() -> None:
    tenancy = Tenancy(("a=s3://uploads/",), ("a=tenants",))
    assert not tenancy.find_scope("a").allows_policy("tenants", own_policy="tenants")
    assert not UNLIMITED.narrow(Limit.of(None, ["tenants"])).allows_policy("tenants", own_policy="default")
    assert UNLIMITED.allows_policy("tenants", own_policy="default")


def test_without_prefixes_every_tenant_may_use_everything() -> None:
    for tenant in ("default", "a"):
        scope = NOT_SEPARATED.find_scope(tenant)
        assert scope.limits == ()
        assert scope.allows_object("uploads", "b/cat.jpg")
        assert not scope.has_policy_limit
        assert scope.allows_policy("any", own_policy="default")
    assert NOT_SEPARATED.find_owner("uploads", "a/cat.jpg") == "default"


def test_a_further_limit_narrows_a_scope_and_never_widens_it() -> None:
    tenant = TENANCY.find_scope("a")
    wide = tenant.narrow(Limit.of(["s3://uploads", "s3://b-only"], ["strict", "other"]))
    assert wide.allows_object("uploads", "a/cat.jpg")
    assert not wide.allows_object("uploads", "b/cat.jpg")
    assert not wide.allows_object("b-only", "cat.jpg")
    assert wide.allows_policy("strict", own_policy="default")
    assert not wide.allows_policy("other", own_policy="default")
    assert not wide.allows_policy("default", own_policy="default"), "the key's list does not have it"
    narrow = tenant.narrow(Limit.of(["s3://uploads/a/public/"], None))
    assert not narrow.allows_object("uploads", "a/private/cat.jpg")
    assert narrow.allows_object("uploads", "a/public/cat.jpg")
    assert narrow.allows_policy("strict", own_policy="default")
    nothing = UNLIMITED.narrow(Limit.of([], []))
    assert not nothing.allows_object("uploads", "a")
    assert not nothing.allows_policy("default", own_policy="default")


@pytest.mark.parametrize(
    ("bucket", "key", "owner"),
    [
        ("uploads", "a/cat.jpg", "a"),
        ("uploads", "b/cat.jpg", "b"),
        ("uploads", "b/shop/cat.jpg", "shop"),
        ("uploads", "b/shop", "b"),
        ("uploads", "c/cat.jpg", "default"),
        ("b-only", "anything", "b"),
        ("shared", "cat.jpg", "default"),
        ("elsewhere", "a/cat.jpg", "default"),
    ],
)
def test_owner_of_an_object_has_its_longest_prefix_alone(bucket: str, key: str, owner: str) -> None:
    assert TENANCY.find_owner(bucket, key) == owner


def test_settings_are_comma_separated_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_S3_BUCKETS", "uploads,more")
    monkeypatch.setenv("SLUICE_TENANT_PREFIXES", "a=s3://uploads/day=1/, a=s3://more ,b b = s3://uploads/b/,")
    monkeypatch.setenv("SLUICE_TENANT_POLICIES", "a=strict,a=lenient")
    settings = load("s3_buckets")
    tenancy = Tenancy(settings.tenant_prefixes, settings.tenant_policies)
    assert tenancy.list_prefixes("a") == ["s3://uploads/day=1/", "s3://more"]
    assert tenancy.list_prefixes("b b") == ["s3://uploads/b/"]
    assert tenancy.find_scope("a").allows_policy("lenient", own_policy="default")
    assert Settings.model_validate(settings.model_dump(mode="json")).tenant_prefixes == settings.tenant_prefixes
