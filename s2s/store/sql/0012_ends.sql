-- What plain SQL changes is audited in full, and a function of ours finds our tables from any search_path.

-- Settings: config_history has each change of a value; the audit also has settings that come, go or get other bounds.
create function s2s_audit_setting() returns trigger language plpgsql as $$
declare
    before jsonb := case tg_op when 'INSERT' then '{}' else to_jsonb(old) - 'version' end;
    after jsonb := case tg_op when 'DELETE' then '{}' else to_jsonb(new) - 'version' end;
begin
    insert into audit (actor, action, subject, params, result)
    values (s2s_actor(), case tg_op when 'INSERT' then 'config.add' when 'UPDATE' then 'config.change'
        else 'config.delete' end, case tg_op when 'DELETE' then old.key else new.key end,
        (select coalesce(jsonb_object_agg(key, value), '{}') from jsonb_each(after)
            where before -> key is distinct from value),
        (select jsonb_build_object('was', jsonb_object_agg(key, value)) from jsonb_each(before)
            where after -> key is distinct from value having count(*) > 0));
    return null;
end
$$;
create trigger config_audit after insert or delete on config for each row
    -- A release declares its settings at each migration.
    when (s2s_action('') <> 'config.declare') execute function s2s_audit_setting();
create trigger config_audit_change after update on config for each row
    when ((old.key, old.type, old.min, old.max) is distinct from (new.key, new.type, new.min, new.max))
    execute function s2s_audit_setting();

-- The counter of versions moves with a setting; moved by hand it leaves a gap.
create function s2s_audit_version() returns trigger language plpgsql as $$
begin
    insert into audit (actor, action, params, result)
    values (s2s_actor(), 'config.version',
        case tg_op when 'DELETE' then '{}' else jsonb_build_object('version', new.version) end,
        case tg_op when 'INSERT' then null else jsonb_build_object('was', old.version) end);
    return null;
end
$$;
create trigger config_version_audit after insert or update or delete on config_version for each row
    when (pg_trigger_depth() = 0) execute function s2s_audit_version();

-- One function for the tables of which a TRUNCATE removes rows that are audited one by one. Arguments: the action, the
-- column that names a row, and the columns that are never told.
create function s2s_audit_truncate() returns trigger language plpgsql as $$
begin
    execute format('insert into %I.audit (actor, action, subject, result) select %I.s2s_actor(), $1, %I::text,'
        ' jsonb_build_object(''was'', to_jsonb(t) - $2) from %I.%I t',
        tg_table_schema, tg_table_schema, tg_argv[1], tg_table_schema, tg_table_name)
        using s2s_action(tg_argv[0]), tg_argv[2]::text[];
    return null;
end
$$;
create trigger api_tokens_audit_truncate before truncate on api_tokens
    for each statement execute function s2s_audit_truncate('tokens.revoke', 'name', '{name,token_sha256}');
create trigger engines_audit_truncate before truncate on engines
    for each statement execute function s2s_audit_truncate('engine.wanted', 'name', '{name}');
create trigger config_audit_truncate before truncate on config
    for each statement execute function s2s_audit_truncate('config.delete', 'key', '{key}');
create trigger config_version_audit_truncate before truncate on config_version
    for each statement execute function s2s_audit_truncate('config.version', 'version', '{only_row}');

-- An engine and a server see a TRUNCATE, too.
create trigger engines_notify_truncate after truncate on engines
    for each statement execute function s2s_notify('s2s_engines');
create trigger config_notify_others after insert or delete or truncate on config
    for each statement execute function s2s_notify('s2s_config');

-- A function runs with the search_path of whoever fires the trigger: pg_restore has none, and a temporary table called
-- audit would take the entries. pg_temp is searched first unless it is named.
do $$
declare
    each regprocedure;
begin
    for each in select oid from pg_proc where pronamespace = current_schema()::regnamespace and proname like 's2s\_%'
    loop
        execute format('alter function %s set search_path = pg_catalog, %I, pg_temp', each, current_schema());
    end loop;
end
$$;
