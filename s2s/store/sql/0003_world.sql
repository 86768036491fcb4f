-- The world and its jobs. docs/protocol.rst, "The world and its jobs", says what they mean.

-- The world: small, real, and to be replaced by a game's own ------------------------------------------------------

create table sectors (
    sector_id bigint primary key check (sector_id between 1 and 9007199254740991),
    name text not null check (char_length(name) between 1 and 200),
    status text not null default 'neutral' check (status in ('fedspace', 'neutral', 'port_closed'))
);

-- A port deals in one commodity: how much it has and what it asks drift toward what is usual there.
create table ports (
    port_id bigint primary key check (port_id between 1 and 9007199254740991),
    sector_id bigint not null references sectors,
    commodity text not null check (commodity in ('ore', 'organics', 'equipment')),
    stock bigint not null,
    base_stock bigint not null,
    capacity bigint not null check (capacity between 0 and 9007199254740991),
    price bigint not null,
    base_price bigint not null,
    min_price bigint not null check (min_price >= 1),
    max_price bigint not null check (max_price <= 9007199254740991),
    constraint ports_stock check (stock between 0 and capacity),
    constraint ports_base_stock check (base_stock between 0 and capacity),
    constraint ports_price check (price between min_price and max_price),
    constraint ports_base_price check (base_price between min_price and max_price)
) with (fillfactor = 50); -- room in each page for its rows' next versions: no index is written for them
create index ports_sector on ports (sector_id);

-- s2s.store.tables.world knows the bounds too, to name them in a refusal; a test holds the two together.
create table ships (
    ship_id bigint primary key check (ship_id between 1 and 9007199254740991),
    player_id bigint not null check (player_id between 1 and 9007199254740991),
    sector_id bigint not null references sectors,
    turns bigint not null check (turns between 0 and 1000000),
    fuel bigint not null check (fuel between 0 and 1000000000),
    shields bigint not null check (shields between 0 and 1000000000),
    hold_capacity bigint not null check (hold_capacity between 0 and 1000000000)
) with (fillfactor = 50);

-- Jobs -----------------------------------------------------------------------------------------------------------

-- One row a job, shared by every engine that has it: whoever has locked it runs it.
create table jobs (
    job_type text primary key check (job_type collate "C" ~ '^[a-z][a-z0-9_.]{0,63}$'),
    schedule text not null,
    -- Of the run that is next, or that is not finished yet; within the years that every reader has.
    due_at timestamptz not null check (due_at between '1970-01-01' and '9999-01-01'),
    state jsonb check (jsonb_typeof(state) = 'object'), -- where a run that is not finished goes on
    attempts integer not null default 0, -- begun in a row, and neither finished nor got on
    retry_at timestamptz, -- not before, after an attempt
    error text, -- of the last attempt
    runs bigint not null default 0,
    last_due_at timestamptz,
    last_finished_at timestamptz,
    last_result jsonb
);
