-- The bundled world, in the schema s2s_world. docs/protocol.rst, "The world and its jobs", explains its tables.

create table s2s_world.sectors (
    sector_id bigint primary key check (sector_id between 1 and 9007199254740991),
    name text not null check (char_length(name) between 1 and 200),
    status text not null default 'neutral' check (status in ('fedspace', 'neutral', 'port_closed'))
);

-- A port deals in one commodity. Its stock and its price drift toward base_stock and base_price.
create table s2s_world.ports (
    port_id bigint primary key check (port_id between 1 and 9007199254740991),
    sector_id bigint not null references s2s_world.sectors,
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
) with (fillfactor = 50); -- room in each page for new row versions, which then need no index entries (HOT)
create index ports_sector on s2s_world.ports (sector_id);

-- s2s.store.tables.world has the same bounds, to name them in a refusal; a test checks that the two agree.
create table s2s_world.ships (
    ship_id bigint primary key check (ship_id between 1 and 9007199254740991),
    player_id bigint not null check (player_id between 1 and 9007199254740991),
    sector_id bigint not null references s2s_world.sectors,
    turns bigint not null check (turns between 0 and 1000000),
    fuel bigint not null check (fuel between 0 and 1000000000),
    shields bigint not null check (shields between 0 and 1000000000),
    hold_capacity bigint not null check (hold_capacity between 0 and 1000000000)
) with (fillfactor = 50);
