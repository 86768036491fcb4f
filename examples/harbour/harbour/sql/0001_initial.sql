-- The search path is the schema of the plug-in, which exists by now.
create table docked (
    cmd_id bigint primary key,
    ship_id bigint not null,
    berth integer not null
);

create table state (state text not null check (state in ('open', 'closed')));
insert into state values ('open');
