-- Keys of our own making, and times that do not rest on a clock that was wrong for a while. docs/protocol.rst, "Clocks".

create table s2s_database (
    only_row boolean primary key default true check (only_row),
    -- In every idem_key that s2s makes itself, so that two databases never make the same one.
    database_id text not null default left(replace(gen_random_uuid()::text, '-', ''), 16)
        check (database_id ~ '^[A-Za-z0-9_-]{1,32}$'),
    -- The time by which retention judges age: it follows now(), and advances by a bounded step in each pass.
    retention_at timestamptz not null default now()
);
insert into s2s_database default values;

-- due_at was set by an operator's retry, or pulled back, and not given by the push. A charge is known by its attempts. Null
-- costs a push nothing.
alter table commands add column due_is_ours boolean;

-- When an operator retired or revoked the key: active_to counts from then.
alter table s2s_keys add column closed_at timestamptz;
